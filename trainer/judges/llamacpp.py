"""A judge that llama.cpp runs from a GGUF file, on CPU or GPU; a grammar lets it say nothing but a choice."""

from __future__ import annotations

import functools
import json
import logging
import re
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.judges import Choice, Judge, Question
from trainer.judges.asking import COMMON_MARKS, defused, read_choice, turns
from trainer.provenance import sha256_file
from trainer.schema import UserError

log = logging.getLogger(__name__)

INSTALL = "pip install -e '.[judge]'"
CUDA = "CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-cache-dir llama-cpp-python"
_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+/[\w.-]+\.gguf", re.IGNORECASE)
_ANSWER_TOKENS = 16


class LlamaCppJudge(Judge):
    """Greedy answers of a GGUF model, constrained by a grammar to the choices.

    Args:
        model: a .gguf file, or `owner/repository/file.gguf` on the hub (asks for the network).
        chat: put questions through the file's chat template (Llama 2's where it has none); false gives plain text.
        n_ctx: tokens of question and answer; a question that is longer is invalid.
        n_gpu_layers: layers on the GPU, -1 for all. Default: all where llama.cpp was built for a GPU.
        threads: CPU threads. Default: half the cores.
        offline: refuse the network.

    Raises:
        UserError: no such file, a file that is no GGUF model, or llama-cpp-python is missing.
    """

    def __init__(
        self,
        model: str = "TheBloke/Llama-2-7b-Chat-GGUF/llama-2-7b-chat.Q4_K_M.gguf",
        chat: bool = True,
        n_ctx: int = 4096,
        n_gpu_layers: int | None = None,
        threads: int | None = None,
        offline: bool = False,
    ) -> None:
        if n_ctx < 1:
            raise UserError(f"judge.n_ctx: {n_ctx} is not possible; give the tokens of the longest question")
        self.model, self.chat, self.n_ctx = model, chat, n_ctx
        self.n_gpu_layers, self.threads, self.offline = n_gpu_layers, threads, offline

    def choose(self, questions: Sequence[Question]) -> Iterator[list[Choice]]:
        """One choice after another: each follows from its question alone."""
        for question in questions:
            yield [self._ask(defused(question, self._marks))]

    def describe(self) -> dict[str, Any]:
        return {
            "class": type(self).__name__,
            "model": Path(self.model).name,
            "sha256": self._digest,
            "chat": self.chat,
            "n_ctx": self.n_ctx,
        }

    def _ask(self, question: Question) -> Choice:
        import llama_cpp

        # What was computed for the question before would change the last digits, and so perhaps the choice.
        self._llama.reset()
        settings: dict[str, Any] = {
            "grammar": llama_cpp.LlamaGrammar.from_string(_grammar(question.choices), verbose=False),
            "temperature": 0.0,
            "max_tokens": _ANSWER_TOKENS,
        }
        try:
            if self.chat:
                answer: Any = self._llama.create_chat_completion(turns(question.text), **settings)  # type: ignore[arg-type]
                said = answer["choices"][0]["message"]["content"] or ""
            else:
                answer = self._llama.create_completion(_plain(question), **settings)
                said = answer["choices"][0]["text"]
        except ValueError as error:
            if "exceed context window" not in str(error):
                raise
            return Choice(question.key, None, f"the question is longer than n_ctx ({error})")
        return Choice(question.key, read_choice(said, question.choices), said)

    @functools.cached_property
    def _path(self) -> Path:
        path = Path(self.model).expanduser()
        if path.is_file():
            return path
        if path.exists() or not _ON_THE_HUB.fullmatch(self.model):
            raise UserError(
                f"judge.model: {self.model} is no file; give a .gguf file, or owner/repository/file.gguf on the hub"
            )
        if self.offline:
            raise UserError(
                f"judge.model: {self.model} is no file here, and the hub needs the network, which offline refuses"
            )
        from huggingface_hub import hf_hub_download

        owner, repository, name = self.model.split("/")
        try:
            return Path(hf_hub_download(f"{owner}/{repository}", name))
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise UserError(f"judge.model: {self.model} is not to be had from the hub ({reason})") from error

    @functools.cached_property
    def _digest(self) -> str:
        return sha256_file(self._path)

    @functools.cached_property
    def _llama(self) -> Any:
        llama_cpp = _imported()
        settings: dict[str, Any] = {"n_ctx": self.n_ctx, "n_gpu_layers": self._layers(), "verbose": False}
        if self.threads is not None:
            settings |= {"n_threads": self.threads, "n_threads_batch": self.threads}
        try:
            llama = llama_cpp.Llama(str(self._path), **settings)
        except (ValueError, RuntimeError, AssertionError) as error:
            raise UserError(
                f"judge.model: {self._path} is no model that llama.cpp can load ({error})"
            ) from error
        # Left to the garbage collector it closes when Python has already taken its own functions away.
        weakref.finalize(self, llama.close)
        return llama

    @functools.cached_property
    def _marks(self) -> list[str]:
        """The vocabulary's control tokens, which llama.cpp would see in any text, and what other templates write."""
        llama_cpp = _imported()
        vocabulary = llama_cpp.llama_model_get_vocab(self._llama.model)
        return [
            *COMMON_MARKS,
            *self._control(llama_cpp, vocabulary),
        ]

    @staticmethod
    def _control(llama_cpp: Any, vocabulary: Any) -> list[str]:
        return [
            llama_cpp.llama_vocab_get_text(vocabulary, token).decode("utf-8", "replace")
            for token in range(llama_cpp.llama_vocab_n_tokens(vocabulary))
            if llama_cpp.llama_vocab_is_control(vocabulary, token)
        ]

    def _layers(self) -> int:
        built = _imported().llama_supports_gpu_offload()
        if self.n_gpu_layers and not built:
            raise UserError(
                f"judge.n_gpu_layers: {self.n_gpu_layers}, but llama-cpp-python was built without a GPU: {CUDA}"
            )
        if self.n_gpu_layers is not None:
            return self.n_gpu_layers
        import torch

        if not built and torch.cuda.is_available():
            log.warning(
                "the judge runs on the CPU: llama-cpp-python was built without CUDA; for that: %s", CUDA
            )
        return -1 if built else 0


def _imported() -> Any:
    try:
        import llama_cpp
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"judge: llama-cpp-python cannot be loaded ({error}); install it again: {INSTALL}"
        ) from error
    except ImportError as error:
        raise UserError(
            f"judge: llama-cpp-python is not installed: {INSTALL} (it builds llama.cpp; for a GPU put"
            " CMAKE_ARGS=-DGGML_CUDA=on before it)"
        ) from error
    return llama_cpp


def _grammar(choices: Sequence[str]) -> str:
    """One of the choices and nothing else (GBNF); most models put a space before it."""
    return f'root ::= " "? ({" | ".join(json.dumps(choice) for choice in choices)})'


def _plain(question: Question) -> str:
    if isinstance(question.text, str):
        return question.text
    raise UserError(f"judge: question {question.key} is a chat, and judge.chat is false; set it to true")
