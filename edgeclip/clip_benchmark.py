"""CLIP_benchmark's command line with edgeclip among its model types: `python -m
edgeclip.clip_benchmark eval --model_type edgeclip --model BUNDLE --pretrained '' ...`."""

from edgeclip.host.evaluation.clip_benchmark import main

if __name__ == "__main__":
    main()
