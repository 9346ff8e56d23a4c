"""What cross-attention looks up beside the frames: keys and values of a prompt and of the portrait, computed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from factorportrait.bundle import NEGATIVE_PROMPT, PROMPT, Bundle
from factorportrait.embeddings import read_embeddings
from factorportrait.engines.base import Buffers, Engine, HostStage, Mirrored, allocate
from factorportrait.errors import UserError
from factorportrait.model_config import TEXT_TOKENS
from factorportrait.runtime.schedule import Guidance
from factorportrait.runtime.vae import to_unit


class LookedUp:
    """Keys and values of text and picture in memory that the transformer is bound to.

    Args:
        prompt, negative: files of embeddings; None takes the bundle's. The negative prompt is what is left where guidance drops the
            text; a bundle without one takes its prompt.
        image: file of the portrait's embeddings; None has them computed by the bundle's picture encoder.

    Raises:
        UserError: an embedding is needed and there is none, or its file does not fit.
    """

    def __init__(
        self, bundle: Bundle, engine: Engine, guidance: Guidance, *, prompt: Path | None, negative: Path | None, image: Path | None
    ):
        config, self._engine = bundle.config.dit, engine
        self._check_unused(config.text_dim, config.image_dim, guidance, {
            "--prompt-embeddings": prompt, "--negative-embeddings": negative, "--image-embeddings": image,
        })  # fmt: skip
        self.tensors: list[Buffers] = [{} for _ in guidance.dropped]
        if config.text_dim is not None:
            constants = bundle.constants()
            stored = constants.get(PROMPT)
            texts = {False: self._text(bundle, prompt, "--prompt-embeddings", stored)}
            if any("text" in dropped for dropped in guidance.dropped):
                texts[True] = self._text(bundle, negative, "--negative-embeddings", constants.get(NEGATIVE_PROMPT, stored))
            kept = {drops: self._embed("text", text) for drops, text in texts.items()}
            self.tensors = [dict(kept["text" in dropped]) for dropped in guidance.dropped]
        self._encoder: HostStage | None = None
        self._image: tuple[Mirrored, object] | None = None
        if config.image_dim is not None:
            self._open_image(bundle, config.image_dim, image)

    def set_portrait(self, portrait: np.ndarray) -> None:
        """uint8 [H,W,3], which goes through the bundle's picture encoder where there is one."""
        if self._encoder is None:
            return
        to_unit(portrait, self._encoder.inputs["image"][0])
        fed, call = self._image
        fed.array[...] = self._encoder()["tokens"]
        fed.send()
        call()

    def _open_image(self, bundle: Bundle, width: int, file: Path | None) -> None:
        if file is not None:
            tokens = read_embeddings(file, width, None, "--image-embeddings")[None]
        elif "image_encoder" in bundle.manifest.stages:
            self._encoder = HostStage(self._engine, "image_encoder")
            (output,) = self._encoder.spec.outputs
            tokens = np.zeros(output.shape, np.float32)
        else:
            raise UserError(
                f"bundle {bundle.path}", expected="a picture encoder, since the transformer looks at the portrait's embeddings",
                found="none", action="give --image-embeddings FILE, or export again with --image-encoder FOLDER",
            )  # fmt: skip
        kept, fed, call = self._bind("image", tokens)
        self._image = fed, call
        for tensors in self.tensors:
            tensors |= kept

    @staticmethod
    def _text(bundle: Bundle, file: Path | None, option: str, stored: np.ndarray | None) -> np.ndarray:
        """[1, TEXT_TOKENS, width]: behind the prompt zeros, which are attended to as in the training."""
        width = bundle.config.dit.text_dim
        if file is not None:
            rows = read_embeddings(file, width, TEXT_TOKENS, option)
        elif stored is not None:
            rows = stored
        else:
            raise UserError(
                f"bundle {bundle.path}", expected="a prompt's embeddings, since the transformer looks at text", found="none",
                action=f"give {option} FILE, or export again with --prompt-embeddings FILE",
            )  # fmt: skip
        text = np.zeros((1, TEXT_TOKENS, width), np.float32)
        text[0, : len(rows)] = rows
        return text

    def _embed(self, source: str, tokens: np.ndarray) -> Buffers:
        return self._bind(source, tokens)[0]

    def _bind(self, source: str, tokens: np.ndarray):
        """Run `SOURCE_embed` once -> its outputs, its input, and the call that runs it again."""
        runner, symbol = self._engine.load(f"{source}_embed"), {"text": "L", "image": "I"}[source]
        sizes = {symbol: tokens.shape[1]}
        inputs, kept = (allocate(self._engine, side, sizes) for side in (runner.spec.inputs, runner.spec.outputs))
        fed = Mirrored(self._engine, inputs[source])
        fed.array[...] = tokens
        fed.send()
        call = runner.bind(inputs, kept)
        call()
        return kept, fed, call

    @staticmethod
    def _check_unused(text_dim: int | None, image_dim: int | None, guidance: Guidance, files: dict[str, Path | None]) -> None:
        widths = {"--prompt-embeddings": text_dim, "--negative-embeddings": text_dim, "--image-embeddings": image_dim}
        for option, file in files.items():
            if file is not None and widths[option] is None:
                raise UserError(option, expected="a transformer that looks at such", found="none", action="leave it out")
        if text_dim is None and frozenset({"text"}) in guidance.dropped:
            raise UserError("--guidance text", expected="a transformer that looks at text", found="none", action="leave it out")
