"""The one training loop: it learns, resumes bit for bit, calls its hooks, and weights tokens as it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebench.trainer import Batch, Hook, TrainConfig, Trainer

VOCABULARY = 12
CONFIG = TrainConfig(
    steps=12, batch_tokens=64, lengths=((0.5, 8), (1.0, 16)), lr=1e-2, log_every=3, evaluate_every=6, checkpoint_every=4
)


class Tiny(nn.Module):
    """The smallest model with an embedding, matrices and a norm: the next token from the current one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.up = nn.Linear(16, 24, bias=False)
        self.down = nn.Linear(24, 16, bias=False)
        self.norm = nn.RMSNorm(16)

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert use_cache is False
        hidden = self.embed(input_ids)
        hidden = self.norm(hidden + self.down(self.up(hidden).relu()))
        return SimpleNamespace(logits=hidden @ self.embed.weight.T)


class Counting:
    """Rows that count upwards from a random start; the weights vary."""

    def __init__(self, up: int = 1) -> None:
        self.up, self.shapes = up, []  # type: ignore[var-annotated]

    def batch(self, rng: Random, rows: int, length: int) -> Batch:
        self.shapes.append((rows, length))
        starts = torch.tensor([[rng.randrange(VOCABULARY)] for _ in range(rows)])
        ids = (starts + self.up * torch.arange(length + 1)) % VOCABULARY
        return Batch(ids, torch.tensor([[rng.choice((0.0, 0.5, 1.0)) for _ in range(length)] for _ in range(rows)]))


class Stop(Hook):
    """A power failure before the data of step ``at`` is used."""

    def __init__(self, at: int) -> None:
        self.at = at

    def before_forward(self, trainer: Trainer, batches: Mapping[str, Batch]) -> None:
        if trainer.step == self.at:
            raise KeyboardInterrupt


def trainer(folder: Path, config: TrainConfig = CONFIG, **more: Any) -> Trainer:
    more.setdefault("sources", {"up": (Counting(), 0.75), "down": (Counting(-1), 0.25)})
    return Trainer(more.pop("model", None) or Tiny(), config=config, folder=folder, **more)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = weights(one), weights(other)
    return all(torch.equal(first[name], second[name]) for name in first)


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("muon_lr", [0.0, 2e-2])
def test_learns(tmp_path: Path, muon_lr: float) -> None:
    config = replace(CONFIG, steps=60, muon_lr=muon_lr)
    made = trainer(tmp_path, config, sources={"up": (Counting(), 1.0)})
    model = made.fit()
    losses = [line["loss/up"] for line in logged(tmp_path)]
    assert losses[0] > 1.5 and losses[-1] < 0.5 * losses[0]
    assert not model.training
    kinds = [type(one).__name__ for one in made.optimisers]
    assert kinds == (["Muon", "AdamW"] if muon_lr else ["AdamW"])


def test_only_the_blocks_matrices_decay_or_go_to_muon(tmp_path: Path) -> None:
    model = Tiny()
    matrices = {id(model.up.weight), id(model.down.weight)}
    (adam,) = trainer(tmp_path, model=model).optimisers
    for group in adam.param_groups:
        inside = {id(p) for p in group["params"]} == matrices
        assert inside or not {id(p) for p in group["params"]} & matrices
        assert group["weight_decay"] == (CONFIG.weight_decay if inside else 0.0) and group["lr"] == CONFIG.lr
    muon, adam = trainer(tmp_path, replace(CONFIG, muon_lr=0.5), model=model).optimisers
    assert {id(p) for g in muon.param_groups for p in g["params"]} == matrices
    assert {g["lr"] for g in muon.param_groups} == {0.5} and {g["lr"] for g in adam.param_groups} == {CONFIG.lr}
    assert sum(len(g["params"]) for g in adam.param_groups) == 2


@pytest.mark.parametrize("muon_lr", [0.0, 2e-2])
@pytest.mark.parametrize("at", [1, 4, 7, 11])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, at: int, muon_lr: float) -> None:
    config = replace(CONFIG, muon_lr=muon_lr)
    whole = trainer(tmp_path / "whole", config)
    whole.fit()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", config, hooks=[Stop(at)]).fit()
    resumed = trainer(tmp_path / "cut", config)
    resumed.fit()
    assert same(whole.model, resumed.model)
    assert (resumed.step, resumed.tokens) == (whole.step, whole.tokens) == (12, whole.tokens)


@pytest.mark.parametrize(("at", "checkpoint"), [(3, 0), (7, 4)])
def test_resuming_leaves_one_log_line_a_step(tmp_path: Path, at: int, checkpoint: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, hooks=[Stop(at)]).fit()  # log lines at 3 and 6
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "tok')  # torn by the failure
    seen: list[int] = []

    class Note(Hook):
        def on_init(self, trainer: Trainer) -> None:
            seen.append(trainer.step)

    trainer(tmp_path, hooks=[Note()]).fit()
    assert seen == [checkpoint]  # hooks start after the checkpoint was loaded
    assert [line["step"] for line in logged(tmp_path)] == [3, 6, 9, 12]


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    first.fit()
    again = trainer(tmp_path, hooks=[Stop(12)])
    again.fit()
    assert same(first.model, again.model) and not again.model.training
    assert len(logged(tmp_path)) == 4


@pytest.mark.parametrize("change", [{"lr": 2e-2}, {"steps": 13}, {"seed": 1}, {"lengths": ((1.0, 8),)}])
def test_refuses_a_checkpoint_of_other_settings(tmp_path: Path, change: dict[str, Any]) -> None:
    trainer(tmp_path).fit()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="was made with other training settings; name another folder or remove it"):
        trainer(tmp_path, replace(CONFIG, **change)).fit()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_data_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    def fit(name: str, seed: int) -> nn.Module:
        torch.manual_seed(len(name))
        return trainer(tmp_path / name, replace(CONFIG, seed=seed)).fit()

    assert same(fit("a", 0), fit("long name", 0))
    assert not same(fit("b", 0), fit("c", 1))


class Recorder(Hook):
    """Writes down every call."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.grads = False

    def on_init(self, trainer: Trainer) -> None:
        self.calls.append("init")

    def before_forward(self, trainer: Trainer, batches: Mapping[str, Batch]) -> None:
        assert list(batches) == ["up", "down"]
        assert all(p.grad is None for p in trainer.model.parameters())
        self.calls.append("before")

    def loss(self, trainer: Trainer, batch: Batch, logits: Tensor) -> Tensor | None:
        assert logits.shape == (*batch.weights.shape, VOCABULARY) and trainer.model.training
        self.calls.append("loss")
        return None

    def after_backward(self, trainer: Trainer) -> None:
        norm = torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm()
        assert 0 < norm <= trainer.config.clip * 1.001
        self.calls.append("backward")
        self.before = weights(trainer.model)

    def after_step(self, trainer: Trainer) -> None:
        now = weights(trainer.model)
        assert not any(torch.equal(now[name], self.before[name]) for name in now)
        self.calls.append("step")

    def on_end(self, trainer: Trainer) -> None:
        assert not trainer.model.training and trainer.step == trainer.config.steps
        self.calls.append("end")


def test_hooks_are_called_in_order(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()
    hooked = trainer(tmp_path / "hooked", replace(CONFIG, clip=0.5), hooks=[first, second, Hook()])
    hooked.fit()
    assert first.calls == ["init", *["before", "loss", "loss", "backward", "step"] * 12, "end"]
    assert second.calls == first.calls
    plain = trainer(tmp_path / "plain", replace(CONFIG, clip=0.5))
    plain.fit()
    assert same(hooked.model, plain.model)  # watching changes nothing


def test_an_extra_loss_is_added_to_each_source_by_its_share(tmp_path: Path) -> None:
    class Extra(Hook):
        def loss(self, trainer: Trainer, batch: Batch, logits: Tensor) -> Tensor:
            return 3.0 * logits.square().mean()

    found: list[dict[str, Tensor]] = []

    class Catch(Hook):
        def after_backward(self, trainer: Trainer) -> None:
            found.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    config = replace(CONFIG, steps=1, clip=1e9)
    hooks: list[Hook] = [Extra(), Catch()]
    made = trainer(tmp_path / "a", config, hooks=hooks)
    made.fit()

    model, total, rng = Tiny(), torch.tensor(0.0), Random("train/0/0")
    for source, share in ((Counting(), 0.75), (Counting(-1), 0.25)):
        batch = source.batch(rng, round(share * 64 / 8), 8)
        logits = model(batch.ids[:, :-1], use_cache=False).logits
        nll = -F.log_softmax(logits, -1).gather(-1, batch.ids[:, 1:, None])[..., 0]
        loss = (nll * batch.weights).sum() / batch.weights.sum()
        assert abs(made.losses["up" if source.up == 1 else "down"] - loss.item()) < 1e-6  # without the extra term
        total = total + share * (loss + 3.0 * logits.square().mean())
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[0][name], parameter.grad, rtol=1e-5, atol=1e-7)

    plain = trainer(tmp_path / "b", config)
    plain.fit()
    assert not same(made.model, plain.model)


def test_a_token_of_weight_zero_teaches_nothing(tmp_path: Path) -> None:
    class Noisy(Counting):
        """Every second target is replaced by ``wrong`` and has no weight."""

        def __init__(self, wrong: int) -> None:
            super().__init__()
            self.wrong = wrong

        def batch(self, rng: Random, rows: int, length: int) -> Batch:
            batch = super().batch(rng, rows, length)
            # the last target only: an earlier one is the next position's input as well
            batch.weights[:, :-1], batch.weights[:, -1] = 1.0, 0.0
            batch.ids[:, -1] = self.wrong
            return batch

    made = [trainer(tmp_path / str(wrong), sources={"up": (Noisy(wrong), 1.0)}).fit() for wrong in (3, 7)]
    assert same(*made)


def test_scaling_all_weights_of_a_source_changes_nothing(tmp_path: Path) -> None:
    class Scaled(Counting):
        def batch(self, rng: Random, rows: int, length: int) -> Batch:
            batch = super().batch(rng, rows, length)
            return Batch(batch.ids, batch.weights * 0.25)  # a power of two: exact

    plain = trainer(tmp_path / "a", sources={"up": (Counting(), 1.0)}).fit()
    assert same(plain, trainer(tmp_path / "b", sources={"up": (Scaled(), 1.0)}).fit())


@pytest.mark.parametrize("muon_lr", [0.0, 2e-2])
def test_a_mask_after_each_step_keeps_weights_zero(tmp_path: Path, muon_lr: float) -> None:
    class Masked(Hook):
        def on_init(self, trainer: Trainer) -> None:
            model = trainer.model
            self.kept = {name: p.abs() > p.abs().median() for name, p in model.named_parameters() if p.ndim == 2}
            self.after_step(trainer)

        def before_forward(self, trainer: Trainer, batches: Mapping[str, Batch]) -> None:
            for name, parameter in trainer.model.named_parameters():
                if name in self.kept:
                    assert not parameter[~self.kept[name]].any()

        @torch.no_grad()
        def after_step(self, trainer: Trainer) -> None:
            for name, parameter in trainer.model.named_parameters():
                if name in self.kept:
                    parameter *= self.kept[name]

    start, hook = weights(Tiny()), Masked()
    trained = weights(trainer(tmp_path, replace(CONFIG, muon_lr=muon_lr), hooks=[hook]).fit())
    for name, kept in hook.kept.items():
        assert not trained[name][~kept].any()
        assert (trained[name][kept] != start[name][kept]).all()  # the others went on learning
        assert 0.4 < kept.float().mean() < 0.6


def test_schedule() -> None:
    config = TrainConfig(steps=1000, warmup=0.02, decay=0.4, lengths=((0.1, 64), (0.5, 128), (1.0, 256)))
    rate: Callable[[int], float] = config.rate_at
    assert [rate(0), rate(9), rate(19), rate(20)] == pytest.approx([1 / 20, 0.5, 1.0, 1.0])
    assert [rate(599), rate(600), rate(800), rate(999)] == pytest.approx([1.0, 1.0, 0.5, 1 / 400])
    assert [config.length_at(step) for step in (0, 99, 100, 499, 500, 999, 1000)] == [64, 64, 128, 128, 256, 256, 256]
    flat = TrainConfig(steps=3, warmup=0.0, decay=0.0)
    assert [flat.rate_at(step) for step in range(3)] == [1.0, 1.0, 1.0]
    assert TrainConfig(steps=10, lengths=((0.5, 8),)).length_at(9) == 8


def test_steps_use_the_schedule_and_the_shares(tmp_path: Path) -> None:
    rates: list[float] = []

    class Rates(Hook):
        def before_forward(self, trainer: Trainer, batches: Mapping[str, Batch]) -> None:
            rates.append(trainer.optimisers[0].param_groups[0]["lr"])

    config = replace(CONFIG, warmup=0.25, decay=0.5)
    up, down = Counting(), Counting(-1)
    made = trainer(tmp_path, config, sources={"up": (up, 0.75), "down": (down, 0.25)}, hooks=[Rates()])
    made.fit()
    assert rates == pytest.approx([config.lr * config.rate_at(step) for step in range(12)])
    assert up.shapes == [(6, 8)] * 6 + [(3, 16)] * 6
    assert down.shapes == [(2, 8)] * 6 + [(1, 16)] * 6
    assert made.tokens == 12 * 64


def test_a_share_always_gives_at_least_one_row(tmp_path: Path) -> None:
    source = Counting()
    trainer(tmp_path, replace(CONFIG, steps=1, batch_tokens=4), sources={"up": (source, 1.0)}).fit()
    assert source.shapes == [(1, 8)]


def test_evaluations_and_log(tmp_path: Path) -> None:
    modes: list[bool] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        modes.append(model.training)
        return {"quality": 0.5}

    model = trainer(tmp_path, replace(CONFIG, steps=10, evaluate_every=4), evaluate=evaluate).fit()
    assert modes == [False] * 3 and not model.training
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 10]
    assert [line["step"] for line in lines if "quality" in line] == [4, 8, 10]
    assert all({"tokens_per_s", "loss/up", "loss/down"} <= set(line) for line in lines if line["step"] % 3 == 0)
    assert [line["length"] for line in lines] == [8, 8, 16, 16, 16, 16]
    assert [line["tokens"] for line in lines] == [64 * line["step"] for line in lines]


def test_autocast_keeps_weights_and_losses_float32(tmp_path: Path) -> None:
    kinds: set[torch.dtype] = set()

    class Kinds(Hook):
        def loss(self, trainer: Trainer, batch: Batch, logits: Tensor) -> None:
            kinds.add(logits.dtype)

        def after_backward(self, trainer: Trainer) -> None:
            assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trainer.model.parameters())

    model = trainer(tmp_path, replace(CONFIG, autocast=True), hooks=[Kinds()]).fit()
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_checkpoint_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer(tmp_path).fit()
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def torn(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        trainer(tmp_path)._save()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
