"""The profiles on the GPU, through HTTP: the exact ones repeat to the bit, in bfloat16 and in FP8."""

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.gpu.test_exact_gpu import SHAPE, VARIANTS
from tests.test_profiles import check_repeats

# Few pages, so that the crowd loses some; a page is the least that the kernels take.
SCARCE = {"num_pages": 12, "page_size": 32, "max_batch_size": 16, "max_prefill_tokens": 64}


def gpus(count):
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs a GPU for each of {count} workers")


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=gpus(2)), pytest.param(4, marks=gpus(4))])
@pytest.mark.parametrize("variant", ["moonlight-like", "v3-like, fp8"])
def test_exact_profiles_repeat_to_the_bit(tmp_path, variant, world_size):
    folder = make_checkpoint(tmp_path / "tiny", **SHAPE, **VARIANTS[variant])
    parallel = {"world_size": world_size, "device": "cuda"}
    model = {"path": str(folder), "dtype": "bfloat16"}
    check_repeats({"model": model, "parallel": parallel, "engine": SCARCE}, start_s=100.0)
