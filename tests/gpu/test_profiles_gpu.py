"""The profiles on the GPU, through HTTP: the exact ones repeat to the bit, in bfloat16 and in FP8."""

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.gpu.test_exact_gpu import SHAPE, VARIANTS
from tests.test_profiles import check_repeats

# The smallest pages that the kernels take.
PAGES = {"moonlight-like": 32, "v3-like, fp8": 64}
# Few of them, so that the crowd loses some.
SCARCE = {"num_pages": 12, "max_batch_size": 16, "max_prefill_tokens": 64}


def gpus(count):
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs a GPU for each of {count} workers")


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=gpus(2)), pytest.param(4, marks=gpus(4))])
@pytest.mark.parametrize("variant", PAGES)
def test_exact_profiles_repeat_to_the_bit(tmp_path, variant, world_size):
    folder = make_checkpoint(tmp_path / "tiny", **SHAPE, **VARIANTS[variant])
    parallel = {"world_size": world_size, "device": "cuda"}
    model = {"path": str(folder), "dtype": "bfloat16"}
    page = PAGES[variant]
    sections = {"model": model, "parallel": parallel, "engine": {**SCARCE, "page_size": page}}
    check_repeats(sections, start_s=100.0, prompt_tokens=2 * page - 17, most_tokens=3 * page)
