"""TPU slices by their names, and the table of them that people read."""

from pathlib import Path

import pytest

from sophia_levanter.errors import InputError
from sophia_levanter.planning.target import GENERATIONS, GIB, shapes_of, tpu_shape

INFRA = Path(__file__).parents[2] / "infra" / "tpu"


@pytest.mark.parametrize(
    ("name", "topology", "chips", "hosts", "memory", "runtime_version"),
    [
        ("v4-8", "2x2x1", 4, 1, 128, "tpu-ubuntu2204-base"),
        ("v4-32", "2x2x4", 16, 4, 512, "tpu-ubuntu2204-base"),
        ("v5litepod-1", "1x1", 1, 1, 16, "v2-alpha-tpuv5-lite"),
        ("v5e-8", "2x4", 8, 1, 128, "v2-alpha-tpuv5-lite"),
        ("v5e-16", "4x4", 16, 4, 256, "v2-alpha-tpuv5-lite"),
        ("v5p-128", "4x4x4", 64, 16, 6080, "v2-alpha-tpuv5"),
        ("v5p-12288", "16x16x24", 6144, 1536, 583680, "v2-alpha-tpuv5"),
        ("v6e-8", "2x4", 8, 1, 256, "v2-alpha-tpuv6e"),
        ("v6e-64", "8x8", 64, 16, 2048, "v2-alpha-tpuv6e"),
    ],
)
def test_slices(name, topology, chips, hosts, memory, runtime_version):
    shape = tpu_shape(name)
    found = (shape.topology, shape.chips, shape.hosts, shape.memory / GIB, shape.runtime_version)
    assert found == (topology, chips, hosts, memory, runtime_version)
    assert shape.accelerator_type == name.replace("v5e", "v5litepod")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("v4-12", "'v4-12'; slices of v4 are v4-8, v4-16, v4-32"),
        ("v5e-2", "'v5e-2'; slices of v5e are v5litepod-1, v5litepod-4"),
        ("v7-8", "'v7-8'; it must be a TPU slice such as v4-32, v5e-16, v5p-8 or v6e-64"),
        ("v4-32 --spot", "'v4-32 --spot'; it must be a TPU slice"),
    ],
)
def test_there_is_no_such_slice(name, wanted):
    with pytest.raises(InputError, match=r"^accelerator is ") as error:
        tpu_shape(name)
    assert wanted in str(error.value)


def test_the_table_for_people_is_the_one_in_the_code():
    rows = [line.strip("| \n").split(" | ") for line in (INFRA / "README.md").open() if line.startswith("| v")]
    shapes = [shape for name in GENERATIONS for shape in shapes_of(name)]
    assert rows == [
        [s.generation, s.accelerator_type, s.topology, f"{s.chips:,}", f"{s.hosts:,}", f"{s.memory / GIB:,.0f}"]
        for s in shapes
    ]
