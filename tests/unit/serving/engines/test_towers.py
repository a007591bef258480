from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip.model
import pytest
import torch
from torch import nn

from serving.engines.clip import ClipEngine
from serving.engines.clip_base import save_base
from serving.engines.layers import PackedLinear, can_pack, pack
from serving.engines.preprocess import Preprocess
from serving.engines.towers import TextWidths, encode_image, encode_text
from tests.support.tiny import CONFIG

Changes = dict[str, Any]
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[49406, 7, 8, 49407, 0, 0], [49406, 49407, 0, 0, 0, 0], [49406, 1, 2, 3, 4, 49407]])
END = {"eos_id": 49407}


def config_of(vision: Changes | None = None, text: Changes | None = None) -> Changes:
    own: dict[str, Any] = CONFIG
    return own | {"vision_cfg": own["vision_cfg"] | (vision or {}), "text_cfg": own["text_cfg"] | (text or {})}


def model(vision: Changes | None = None, text: Changes | None = None, kind: Any = open_clip.model.CLIP) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: nn.Module = kind(**config_of(vision, text)).eval()
        for block in (module for module in made.modules() if hasattr(module, "gamma")):
            nn.init.normal_(block.gamma)
    return made


def own_texts(whole: Any, ids: torch.Tensor) -> torch.Tensor:
    padded = torch.zeros(len(ids), config_of()["text_cfg"]["context_length"], dtype=torch.long)
    padded[:, : ids.shape[1]] = ids
    return torch.as_tensor(whole.encode_text(padded))


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of tokens per row that the MLP of a block was given, by call."""
    seen: list[int] = []
    whole: Callable[..., torch.Tensor] = nn.GELU.forward

    def forward(self: nn.GELU, inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs.shape[1])
        return whole(self, inputs)

    monkeypatch.setattr(nn.GELU, "forward", forward)
    return seen


@torch.inference_mode()
@pytest.mark.parametrize(
    ("vision", "tokens"),
    [
        ({}, [17, 1]),
        ({"ls_init_value": 0.1}, [17, 1]),
        ({"final_ln_after_pool": True}, [17, 1]),
        ({"pool_type": "avg"}, [17, 17]),
        ({"attentional_pool": True, "attn_pooler_heads": 2}, [17, 17]),
    ],
    ids=str,
)
def test_a_vit_that_pools_its_class_token(vision: Changes, tokens: list[int], blocks: list[int]) -> None:
    whole = model(vision)
    expected = whole.encode_image(IMAGES)  # type: ignore[operator]
    blocks.clear()
    torch.testing.assert_close(encode_image(whole, IMAGES), expected, atol=1e-5, rtol=1e-4)
    assert blocks == tokens


@torch.inference_mode()
@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ({}, open_clip.model.CLIP),
        ({}, open_clip.model.CustomTextCLIP),
        ({"pool_type": "eos", **END}, open_clip.model.CustomTextCLIP),
        ({"ls_init_value": 0.1, "proj_bias": True}, open_clip.model.CustomTextCLIP),
    ],
    ids=str,
)
def test_a_text_tower_that_pools_the_end(text: Changes, kind: Any, blocks: list[int]) -> None:
    whole = model(text=text, kind=kind)
    expected = own_texts(whole, IDS)
    blocks.clear()
    torch.testing.assert_close(encode_text(whole, IDS), expected, atol=1e-5, rtol=1e-4)
    assert blocks == [IDS.shape[1], 1]


@torch.inference_mode()
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_gelu_is_computed_with_the_layer_before_it(approximate: str) -> None:
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert can_pack(torch.bfloat16), "if torch has moved it, half precision would silently be slow"
    if not can_pack(torch.float32):
        pytest.skip("this torch has no oneDNN")
    linear, gelu = nn.Linear(64, 32), nn.GELU(approximate)
    inputs = torch.randn(3, 5, 64)
    packed = PackedLinear(pack(linear.weight), linear.bias, gelu)
    torch.testing.assert_close(packed(inputs), gelu(linear(inputs)), atol=1e-5, rtol=1e-4)


TEXTS = ["a", "a photo of a cat", "seven words of a middling long text", "word " * 60]


@pytest.mark.parametrize(
    ("text", "trims"),
    [({}, True), ({"no_causal_mask": True, "pool_type": "last"}, False), ({"no_causal_mask": True}, False)],
)
def test_a_tower_that_sees_its_padding_gets_full_length(tmp_path: Path, text: Changes, trims: bool) -> None:
    """A separate text tower, as SigLIP and CLIPA have it."""
    own = model(text=text, kind=open_clip.model.CustomTextCLIP)
    config = config_of(text=text) | {"custom_text": True}
    base = save_base(tmp_path, "custom", own, config, Preprocess(size=32), {"kind": "simple", "kwargs": {}})
    engine = ClipEngine(base, device="cpu")
    assert engine.widths.trims is trims
    with torch.inference_mode():
        whole = engine.model().encode_text(engine.tokenizer(TEXTS), normalize=True)  # type: ignore[operator]
    np.testing.assert_allclose(engine.encode_texts(TEXTS), np.asarray(whole), atol=1e-5)


@pytest.mark.parametrize(
    ("widths", "lengths", "most", "passes"),
    [
        (TextWidths(77, True, bucket=8), [10, 70, 12, 9, 20, 77], 64, [(24, [3, 0, 2, 4]), (77, [1, 5])]),
        (TextWidths(77, True), [9] * 7, 3, [(9, [0, 1, 2]), (9, [3, 4, 5]), (9, [6])]),
        (TextWidths(77, False), [9, 70], 64, [(77, [0, 1])]),
        (TextWidths(77, True), [], 64, []),
    ],
    ids=["short texts do not pay for long ones", "rows of a pass", "full length", "nothing"],
)
def test_texts_of_about_one_length_share_a_pass(
    widths: TextWidths, lengths: list[int], most: int, passes: list[tuple[int, list[int]]]
) -> None:
    assert list(widths.passes(lengths, most)) == passes
