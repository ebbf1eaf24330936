"""What a new user gets wrong: each answer is one line with the argument, the rule and the value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastvq
from fastvq import models, ops

X, CODES = torch.zeros(8, 4), torch.ones(5, 4)
LABELS = torch.tensor([5])
MAP = torch.zeros(1, 4, 3, 3)


def _classes() -> models.PixelCNN:
    return models.PixelCNN(8, 8, 1, num_classes=3)


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "sparse rows": (
        lambda: ops.nearest_code(X.to_sparse(), CODES),
        TypeError,
        r"nearest_code: x must be dense; got sparse_coo. Convert it with x.to_dense\(\).",
    ),
    "k-means of a string": (
        lambda: fastvq.kmeans("x", 2),  # type: ignore[arg-type]
        TypeError,
        r"kmeans: x must be a torch.Tensor; got str.",
    ),
    "k-means with a word for a seed": (
        lambda: fastvq.kmeans(X, 2, seed="a"),  # type: ignore[arg-type]
        TypeError,
        r"kmeans: seed must be an int; got str.",
    ),
    "half a code": (
        lambda: fastvq.kmeans(X, 2.5),  # type: ignore[arg-type]
        TypeError,
        r"kmeans: num_codes must be an int; got float.",
    ),
    "a word for dim": (
        lambda: fastvq.VectorQuantize("4", 5),  # type: ignore[arg-type]
        TypeError,
        r"VectorQuantize: dim must be an int; got str.",
    ),
    "no codes": (
        lambda: fastvq.VectorQuantize(4, 0),
        ValueError,
        r"VectorQuantize: codebook_size must be at least 1; got 0.",
    ),
    "codes without channels": (
        lambda: fastvq.VectorQuantize(4, 5, codebook_dim=0),
        ValueError,
        r"VectorQuantize: codebook_dim must be at least 1; got 0.",
    ),
    "a decimal comma": (
        lambda: fastvq.VectorQuantize(4, 5, decay="0,8"),  # type: ignore[arg-type]
        TypeError,
        r"Codebook: decay must be a number; got str '0,8'.",
    ),
    "quantizing a string": (
        lambda: fastvq.VectorQuantize(4, 5)("x"),
        TypeError,
        r"VectorQuantize: x must be a torch.Tensor; got str.",
    ),
    "an index past the codebook": (
        lambda: fastvq.VectorQuantize(4, 5).get_codes_from_indices(torch.tensor([[7]])),
        ValueError,
        r"VectorQuantize.get_codes_from_indices: indices must be −1 or in 0 … 4; got 7.",
    ),
    "predicting an index past the codebook": (
        lambda: fastvq.VectorQuantize(4, 5)(X[None], indices=torch.full((1, 8), 5)),
        ValueError,
        r"VectorQuantize.forward: indices must be −1 or in 0 … 4; got 5.",
    ),
    "learning from an index past the codebook": (
        lambda: fastvq.VectorQuantize(4, 5).update_indices(X[None], torch.full((1, 8), 5)),
        ValueError,
        r"VectorQuantize.update_indices: indices must be −1 or in 0 … 4; got 5.",
    ),
    "indices that are floats": (
        lambda: fastvq.VectorQuantize(4, 5).get_codes_from_indices(torch.tensor([[1.0]])),
        TypeError,
        r"VectorQuantize.get_codes_from_indices: indices must be integers; got float32.",
    ),
    "an index past a level's codebook": (
        lambda: fastvq.ResidualVQ(dim=4, num_quantizers=2, codebook_size=5).get_output_from_indices(
            torch.tensor([[[0, 9]]])
        ),
        ValueError,
        r"ResidualVQ.get_codes_from_indices: indices must be −1 or in 0 … 4; got 9.",
    ),
    "levels that are no number": (
        lambda: fastvq.ResidualVQ(dim=4, num_quantizers=2.0, codebook_size=5),  # type: ignore[arg-type]
        TypeError,
        r"ResidualVQ: num_quantizers must be an int; got float.",
    ),
    "SimVQ without codes": (
        lambda: fastvq.SimVQ(4, 0),
        ValueError,
        r"SimVQ: codebook_size must be at least 1; got 0.",
    ),
    "an index past SimVQ's codebook": (
        lambda: fastvq.SimVQ(4, 5).indices_to_codes(torch.tensor([[5]])),
        ValueError,
        r"SimVQ.indices_to_codes: indices must be −1 or in 0 … 4; got 5.",
    ),
    "an index past FSQ's codes": (
        lambda: fastvq.FSQ([8, 5]).indices_to_codes(torch.tensor([99])),
        ValueError,
        r"FSQ.indices_to_codes: indices must be −1 or in 0 … 39; got 99.",
    ),
    "an index past LFQ's codes": (
        lambda: fastvq.LFQ(dim=3).indices_to_codes(torch.tensor([8])),
        ValueError,
        r"LFQ.indices_to_codes: indices must be −1 or in 0 … 7; got 8.",
    ),
    "LFQ of negative width": (
        lambda: fastvq.LFQ(dim=-1),
        ValueError,
        r"LFQ: dim must be at least 1; got -1.",
    ),
    "a class that the layer does not know": (
        lambda: fastvq.GatedMaskedConv2d(4, 3, num_classes=3)(MAP, MAP, LABELS),
        ValueError,
        r"GatedMaskedConv2d: class_labels must be in 0 … 2; got 5.",
    ),
    "a certain dropout": (
        lambda: models.PixelCNN(8, 8, 1, dropout=2),
        ValueError,
        r"GatedMaskedConv2d: dropout must be in 0 … 1; got 2.",
    ),
    "a class by its name": (
        lambda: _classes().sample((2, 2), 1, class_labels="cat"),  # type: ignore[arg-type]
        TypeError,
        r"PixelCNN: class_labels must be a torch.Tensor; got str.",
    ),
    "a word for num_codes": (
        lambda: models.PixelCNN("8"),  # type: ignore[arg-type]
        TypeError,
        r"PixelCNN: num_codes must be an int; got str.",
    ),
    "a word for image_size": (
        lambda: models.VAE(image_size="28"),  # type: ignore[arg-type]
        TypeError,
        r"VAE: image_size must be an int; got str.",
    ),
    "fewer than no samples": (
        lambda: models.VAE().sample(-1),
        ValueError,
        r"VAE.sample: n must be at least 0; got -1.",
    ),
    "half a sample": (
        lambda: models.VAE().sample(2.5),  # type: ignore[arg-type]
        TypeError,
        r"VAE.sample: n must be an int; got float.",
    ),
    "a word for levels": (
        lambda: models.VQVAE2(levels="2"),  # type: ignore[arg-type]
        TypeError,
        r"VQVAE2: levels must be an int; got str.",
    ),
    "one dilation without its brackets": (
        lambda: models.VQVAE(dimensions=1, dilations=3),  # type: ignore[arg-type]
        ValueError,
        r"VQVAE: dilations must be at least one of 1, 2, …; got 3.",
    ),
    "a prior over a VAE": (
        lambda: models.HierarchicalPrior.for_model(models.VAE(), image_size=28),
        TypeError,
        r"HierarchicalPrior.for_model: vqvae2 must be a VQVAE2 or a VQVAE; got VAE.",
    ),
    "loading a number": (
        lambda: models.VAE.from_pretrained(3),  # type: ignore[arg-type]
        TypeError,
        r"from_pretrained: directory_or_hub_id must be a path or 'owner/name'; got int.",
    ),
}


@pytest.mark.parametrize(("call", "error", "words"), WRONG.values(), ids=WRONG)
def test_the_line_names_argument_rule_and_value(
    call: Callable[[], Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"^{words}$") as refused:
        call()
    assert "\n" not in str(refused.value)


def test_a_model_is_not_saved_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"save_pretrained: '.*model' must be a folder"):
        models.VAE().save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"
