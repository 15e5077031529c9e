"""The recipes for class embeddings on docs/targets.md, with a tiny text model and a few word vectors in place of published ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from kdx.data.class_embeddings import read_class_embeddings
from tests.docs.test_pages import DOCS, blocks

CLIP, WORDS = blocks(DOCS / "targets.md", "python no-run")
CLASSES = ("cat", "dog", "owl")


def tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    """A tokenizer whose words are the letters, each also at the end of a word."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def test_the_recipe_for_clip_writes_the_text_embeddings_of_the_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=32, projection_dim=6, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=40, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    model = transformers.CLIPTextModelWithProjection(config).eval()
    words = tokenizer(tmp_path)
    for part in (model, words):
        part.save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert CLIP.count("openai/clip-vit-base-patch32") == 1
    exec(CLIP.replace("openai/clip-vit-base-patch32", str(tmp_path / "tiny")), {})
    rows = read_class_embeddings(tmp_path / "clip.npz", CLASSES).rows
    for label, row in zip(CLASSES, rows, strict=True):
        ids = [
            52,
            *(
                ord(letter) - 97 + 26 * (place == len(word) - 1)
                for word in f"a photo of a {label}".split()
                for place, letter in enumerate(word)
            ),
            53,
        ]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).text_embeds[0].numpy()
        assert np.allclose(row, expected / np.linalg.norm(expected), atol=1e-6)
    assert np.ptp(rows, axis=0).max() > 1e-3


def test_the_recipe_for_words_averages_the_words_of_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = {"cat": [3.0, 4.0], "dog": [0.0, -2.0], "great": [1.0, 0.0], "owl": [1.0, 2.0], "hen": [9.0, 9.0]}
    (tmp_path / "glove.6B.300d.txt").write_text("".join(f"{word} {row[0]} {row[1]}\n" for word, row in vectors.items()))
    monkeypatch.chdir(tmp_path)
    exec(WORDS, {})
    rows = read_class_embeddings(tmp_path / "words.npz", ["cat", "dog", "great owl"]).rows
    assert np.allclose(rows, np.array([[0.6, 0.8], [0.0, -1.0], [0.70710678, 0.70710678]]))
