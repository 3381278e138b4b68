"""A machine as the kernel's files tell of it."""

from edgeclip.device.machine import Facts

FACTS = Facts(arch="aarch64", python="3.10.12", os="an os", memory_mib=8000)


def fake(root, files):
    """A tree in the kernel's documented layout."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


JETSON = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0",
    "proc/device-tree/bus@0/gpu@17000000/compatible": "nvidia,ga10b\0",
    "proc/meminfo": "MemTotal:        7802356 kB\nMemFree:         1000000 kB\nMemAvailable:    5242880 kB\nSwapTotal:       3901168 kB\n",
    "proc/loadavg": "0.31 0.20 0.11 1/400 1234\n",
    "proc/sys/kernel/random/boot_id": "3f1c0d3e-0000-4000-8000-000000000001\n",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n",
    "var/lib/nvpmodel/status": "pmode:0002 fmode:cool",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
    "var/lib/dpkg/status": "Package: libnvinfer10\nStatus: install ok installed\nPriority: optional\nVersion: 10.3.0.30-1+cuda12.5\n\n"
    "Package: nvidia-jetpack\nStatus: install ok installed\nVersion: 6.2+b77\n\nPackage: cuda-cudart-12-6\nStatus: deinstall ok config-files\nVersion: 12.6.68-1\n",
    "sys/class/thermal/thermal_zone0/temp": "48500\n",
    "sys/class/thermal/thermal_zone8/temp": "51187\n",
    "sys/class/thermal/thermal_zone8/trip_point_0_type": "passive\n",
    "sys/class/thermal/thermal_zone8/trip_point_0_temp": "99000\n",
    "sys/class/thermal/thermal_zone8/trip_point_1_type": "critical\n",
    "sys/class/thermal/thermal_zone8/trip_point_1_temp": "104500\n",
    "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device0/cur_state": "2\n",
    "sys/class/thermal/cooling_device1/type": "cpufreq-cpu0\n",
    "sys/class/thermal/cooling_device1/cur_state": "0\n",
    "sys/class/hwmon/hwmon4/oc1_event_cnt": "3\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq": "1728000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "1728000\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
}
