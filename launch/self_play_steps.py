"""The steps of self-play's iterations, as those of a recipe: which command, which inputs, which folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jsonargparse import Namespace

from launch.stages import Step
from trainer.policy.folders import is_adapter, resolve
from trainer.policy.load import PolicyConfig, saved_policy


@dataclasses.dataclass(frozen=True)
class Loop:
    """What all iterations share. `passed`: words for `fit`."""

    given: Namespace
    passed: tuple[str, ...]
    first: PolicyConfig

    @property
    def root(self) -> Path:
        return Path(self.given.output_dir)

    def folder(self, kind: str, iteration: int) -> Path:
        return self.root / f"{kind}-{iteration}"

    def start(self, iteration: int) -> str | None:
        """The opponent's adapter (or all its weights); None for the bare base."""
        if iteration == 1:
            return self.first.start
        return str(self.folder("train", iteration - 1) / "checkpoints" / "last")

    def opponent(self, iteration: int) -> PolicyConfig:
        start = self.start(iteration)
        if iteration == 1 or start is None:
            return self.first
        return self.saved(start)

    def saved(self, path: str | Path) -> PolicyConfig:
        """An adapter (or all weights) that was trained, on the loop's base."""
        given = self.given
        settings = {name: getattr(given, name) for name in ("revision", "offline", "trust_remote_code")}
        return saved_policy(path, self.first.base, **settings)

    def shards(self, iteration: int) -> int:
        """Of its generation: as many as it was begun with, or else as many as are asked for now."""
        found = self.begun(iteration)
        return self.given.shards if not found or self.given.shards in found else max(found)

    def begun(self, iteration: int) -> dict[int, list[Path]]:
        """The shards that lie in a generation's folder, by their number."""
        found: dict[int, list[Path]] = {}
        for settings in sorted(self.folder("generate", iteration).glob("shard-*-of-*/settings.json")):
            number = settings.parent.name.rpartition("-")[2]
            if number.isdecimal():
                found.setdefault(int(number), []).append(settings.parent)
        return found

    # The steps of an iteration

    def player(self, iteration: int) -> list[Step]:
        """All that an iteration's adapter is made by."""
        return [*self.generations(iteration), self.conversion(iteration), self.training(iteration)]

    def generations(self, iteration: int) -> list[Step]:
        start, given = self.start(iteration), self.given
        words = ["spin", "generate", *(["--config", given.generate] if given.generate else [])]
        words += ["--input_dir", given.input_dir, "--output_dir", str(self.folder("generate", iteration))]
        words += ["--model", start or self.first.base]
        if start is not None and _names_adapter(start):
            words += ["--base_model", self.first.base]
        words += ["--tokenizer", given.tokenizer or self.first.base]
        words += ["--seed", str(given.seed + iteration - 1)]
        words += ["--revision", given.revision] if given.revision else []
        words += ["--trust_remote_code"] if given.trust_remote_code else []
        inputs = [given.input_dir, start or self.first.base, *([given.generate] if given.generate else [])]
        steps, shards = [], self.shards(iteration)
        for number in range(1, shards + 1):
            name = f"generate-{iteration}" + (f"-{number}" if shards > 1 else "")
            shard = self.folder("generate", iteration) / f"shard-{number}-of-{shards}"
            asked = [*words, "--shard", f"{number}/{shards}"]
            steps.append(self._step(name, shard, asked, inputs, "manifest.json"))
        return steps

    def conversion(self, iteration: int) -> Step:
        folder, source = self.folder("convert", iteration), self.folder("generate", iteration)
        words = ["spin", "convert", "--input_dir", str(source), "--output_dir", str(folder)]
        before = range(max(1, iteration - self.given.mixed), iteration)
        previous = [str(self.folder("convert", each)) for each in before]
        words += ["--previous", *previous] if previous else []
        return self._step(f"convert-{iteration}", folder, words, [str(source), *previous], "manifest.json")

    def training(self, iteration: int) -> Step:
        folder = self.folder("train", iteration)
        words = ["fit", *self._settings(iteration), "--run", str(folder)]
        return self._step(f"train-{iteration}", folder, words, self._inputs(iteration), "checkpoints/last")

    def validation(self, iteration: int) -> Step:
        """Of all test chats; what it prints is kept in its folder."""
        folder, train = self.folder("validate", iteration), self.folder("train", iteration)
        weights = str(train / "checkpoints" / "last")
        words = ["validate", *self._settings(iteration), "--run", str(folder), "--weights", weights]
        words += ["--trainer.limit_val_batches", "1.0"]
        return self._step(
            f"validate-{iteration}", folder, words, [*self._inputs(iteration), weights], "metrics.json"
        )

    def _settings(self, iteration: int) -> list[str]:
        """The words of a config for `fit`; what is passed comes last and has its way."""
        given, seed = self.given, str(self.given.seed + iteration - 1)
        words = [word for file in given.config for word in ("--config", file)]
        words += ["--model.policy.base", self.first.base]
        words += ["--model.policy.revision", given.revision] if given.revision else []
        words += ["--model.policy.trust_remote_code", "true"] if given.trust_remote_code else []
        if (start := self.start(iteration)) is not None:
            words += ["--model.policy.start", start]
        words += ["--data.source.path", str(self.folder("convert", iteration))]
        words += ["--seed_everything", seed, "--data.seed", seed]
        for name, values in (("model.optimizer.lr", given.lr), ("model.objective.beta", given.beta)):
            words += [f"--{name}", str(values[min(iteration, len(values)) - 1])] if values else []
        return [*words, *self.passed]

    def _inputs(self, iteration: int) -> list[str]:
        start = self.start(iteration)
        return [self.first.base, str(self.folder("convert", iteration)), *([start] if start else [])]

    def _step(self, name: str, folder: Path, words: list[str], inputs: list[str], output: str) -> Step:
        configs = self.given.config if words[0] in ("fit", "validate") else []
        return Step(
            stage=name,
            name=name,
            root=self.root,
            folder=folder,
            command=tuple(words[: 2 if words[0] == "spin" else 1]),
            words=tuple(words),
            configs=tuple(map(Path, configs)),
            inputs=tuple(inputs),
            values=(),
            outputs=(folder / output,),
        )


def _names_adapter(start: str) -> bool:
    path = resolve(start)
    return path.is_file() or is_adapter(path)
