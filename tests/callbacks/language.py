"""A small LightningModule around a real policy and a real reference, trained on nothing but a few tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from typing_extensions import override

from tests.callbacks.tiny import Batch, TinyModule
from trainer.policy.load import PolicyConfig, load_policy, load_tokenizer
from trainer.policy.reference import ReferenceConfig, build_reference


class LanguageModule(TinyModule):
    """IA³ on a tiny model; each step draws random tokens, so its losses tell whether others drew as well."""

    def __init__(self, base: Path, reference: bool = True, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__init__(**kwargs)
        config = PolicyConfig(base=str(base))
        self.policy = load_policy(config)  # type: ignore[assignment]
        self.tokenizer = load_tokenizer(str(base))
        self.reference = build_reference(ReferenceConfig(), config, self.policy) if reference else None

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        ids = torch.randint(3, 200, (2, 8))
        loss = self.policy(input_ids=ids, labels=ids).loss
        self.losses.append(loss.item())
        self.values.append(batch.value)
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.policy.parameters() if p.requires_grad], lr=200.0)
