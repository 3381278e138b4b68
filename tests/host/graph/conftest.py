"""The student's graph, calibrated, and its form for TensorRT."""

import numpy as np
import pytest

from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.float16 import to_fp16
from edgeclip.host.graph.qdq import quantize
from tests.support.graphs import prepare
from tests.support.toy_bundle import toy_input


@pytest.fixture(scope="module")
def images():
    return np.stack([toy_input(i) for i in range(40)])


@pytest.fixture(scope="module")
def calibrated(student, images):
    return prepare(student, images, 18)


@pytest.fixture(scope="module")
def tensorrt_form(student, images):
    calibrated = prepare(student, images, 19)
    return to_fp16(
        quantize(
            calibrated,
            graph.matrix_products(calibrated.model),
            activations="int8",
            for_tensorrt=True,
        )
    )
