"""``MergeCallback`` in a ``transformers.Trainer``: what is evaluated, saved, resumed and held is one set of weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import launch
from torch import Tensor, nn

from lightning_merge.rules import ExponentialMean, Mean, Rule, ValleyMean
from lightning_merge.schedules import EveryNEpochs, EveryNSteps, Schedule
from lightning_merge.selections import Selection

transformers = pytest.importorskip("transformers")
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from lightning_merge.transformers import MergeCallback  # noqa: E402
from lightning_merge.transformers._refused import refuse  # noqa: E402


def model() -> Any:
    torch.manual_seed(0)
    size = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 16, "n_positions": 8}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=1))  # its head is tied to its embedding


def tokens(count: int, seed: int) -> list[dict[str, Tensor]]:
    drawn = torch.randint(16, (count, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": each, "labels": each} for each in drawn]


class Losses(TrainerCallback):
    """What each evaluation has found, by step."""

    def __init__(self) -> None:
        self.found: dict[int, float] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        self.found[state.global_step] = metrics["eval_loss"]


def make(root: Path, *callbacks: Any, of: Any = None, kind: type = Trainer, **settings: Any) -> Any:
    """A Trainer of 8 steps in 2 epochs that evaluates and saves at every second step."""
    defaults: dict[str, Any] = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "learning_rate": 0.05,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 0,
    }
    arguments = TrainingArguments(str(root), **{**defaults, **settings})
    data = {"train_dataset": tokens(16, 1), "eval_dataset": tokens(8, 2)}
    return kind(model() if of is None else of, arguments, callbacks=list(callbacks), **data)


def loss(network: nn.Module) -> float:
    """The ``eval_loss`` of a model, by a Trainer without the callback."""
    return float(make(Path("unused"), of=network, eval_strategy="no", save_strategy="no").evaluate()["eval_loss"])


def values(network: Any) -> dict[str, Tensor]:
    tensors = network if isinstance(network, dict) else dict(network.named_parameters())
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(left: Any, right: Any) -> bool:
    left, right = values(left), values(right)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def read(root: Path, step: int) -> Any:
    return GPT2LMHeadModel.from_pretrained(root / f"checkpoint-{step}")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, MergeCallback, Losses]:
    root = tmp_path_factory.mktemp("run")
    callback, losses = MergeCallback(ExponentialMean(0.5)), Losses()
    trainer = make(root, callback, losses)
    trainer.train()
    return root, trainer, callback, losses


def test_each_checkpoint_holds_what_was_evaluated_and_so_does_the_model_in_the_end(uninterrupted: Any) -> None:
    root, trainer, callback, losses = uninterrupted
    assert sorted(losses.found) == [2, 4, 6, 8]
    for step, found in losses.found.items():
        assert loss(read(root, step)) == found
    assert same(read(root, 8), trainer.model)
    assert trainer.evaluate()["eval_loss"] == losses.found[8]
    merged = callback.merged_weights()
    assert all(torch.equal(merged[name], tensor) for name, tensor in trainer.model.named_parameters())
    trainer.save_model(root / "end")
    assert same(GPT2LMHeadModel.from_pretrained(root / "end"), trainer.model)


def test_training_is_that_of_a_run_without_the_callback(uninterrupted: Any, tmp_path: Path) -> None:
    _, trainer, callback, losses = uninterrupted
    plain, raw_losses = make(tmp_path, without := Losses()), without
    plain.train()
    assert same(callback.raw_weights(), plain.model)
    assert not same(trainer.model, plain.model)
    assert raw_losses.found != losses.found
    saved = torch.load(uninterrupted[0] / "checkpoint-4" / "lightning_merge.pt", weights_only=True)["raw"]
    assert same(saved, read(tmp_path, 4))


RULES: list[tuple[Rule, Schedule]] = [
    (ExponentialMean(0.5), EveryNSteps()),
    (ExponentialMean(half_life="25%", warmup="timm"), EveryNSteps(start=0.25)),
    (Mean(), EveryNEpochs()),
]


# The last step of an epoch is where a resumed run begins the next one, and ends none.
RESUMED = [(rule, schedule, 3) for rule, schedule in RULES] + [(Mean(), EveryNEpochs(), 4)]


@pytest.mark.parametrize(("rule", "schedule", "every"), RESUMED, ids=repr)
def test_a_resumed_run_equals_an_uninterrupted_one(rule: Rule, schedule: Schedule, every: int, tmp_path: Path) -> None:
    settings = {"save_steps": every, "eval_steps": every}
    whole = make(tmp_path, callback := MergeCallback(rule, schedule), losses := Losses(), **settings)
    whole.train()
    # Another seed, and a model that has nothing of it: all comes from the folder.
    other = nn.Module.apply(model(), lambda each: [p.data.fill_(9.0) for p in each.parameters()] and None)
    second, again = MergeCallback(rule, schedule), Losses()
    resumed = make(tmp_path / "resumed", second, again, of=other, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{every}"))
    assert again.found == {step: found for step, found in losses.found.items() if step > every}
    assert 2 * every in again.found
    assert same(whole.model, resumed.model)
    assert same(callback.raw_weights(), second.raw_weights())
    assert same(callback.merged_weights(), second.merged_weights())
    assert second.averager is not None
    assert second.averager.steps == 8


def test_the_best_checkpoint_is_the_best_of_the_merged_weights(tmp_path: Path) -> None:
    # The highest loss, which is not that of the end.
    settings: dict[str, Any] = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    }
    settings["learning_rate"] = 1.0
    trainer = make(tmp_path, callback := MergeCallback(ExponentialMean(0.5)), losses := Losses(), **settings)
    trainer.train()
    best = max(losses.found, key=lambda step: losses.found[step])
    assert trainer.state.best_global_step == best < 8
    assert same(read(tmp_path, best), trainer.model)
    assert trainer.evaluate()["eval_loss"] == losses.found[best]
    assert callback.raw_weights() == {}


def test_accumulated_batches_are_no_steps(tmp_path: Path) -> None:
    callback = MergeCallback(Mean())
    make(tmp_path, callback, gradient_accumulation_steps=2, save_strategy="no").train()
    assert callback.averager is not None
    assert callback.averager.steps == callback.averager.updates == 4


def test_until_something_is_merged_all_is_as_without_it(tmp_path: Path) -> None:
    trainer = make(tmp_path / "with", MergeCallback(Mean(), EveryNSteps(start=100)), losses := Losses())
    trainer.train()
    plain = make(tmp_path / "without", others := Losses())
    plain.train()
    assert losses.found == others.found
    assert same(trainer.model, plain.model)
    assert same(read(tmp_path / "with", 4), read(tmp_path / "without", 4))


class Failing(Trainer):  # type: ignore[misc]
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        super().evaluate(*args, **kwargs)
        if self.state.global_step == 4:
            raise ConnectionError
        return {"eval_loss": 0.0}


def test_after_a_failure_the_raw_weights_are_live(tmp_path: Path) -> None:
    trained = []
    for callbacks in ([MergeCallback(ExponentialMean(0.5))], []):
        trainer = make(tmp_path / str(len(callbacks)), *callbacks, kind=Failing)
        with pytest.raises(ConnectionError):
            trainer.train()
        trained.append(trainer.model)
    assert same(*trained)


class Around(TrainerCallback):
    """Puts something around ``evaluate`` after the callback has, as loggers do."""

    trainer: Any

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        inner = self.trainer.evaluate
        self.trainer.evaluate = lambda *given, **options: inner(*given, **options)


def test_a_second_training_evaluates_its_own_average(tmp_path: Path) -> None:
    around, losses = Around(), Losses()
    around.trainer = trainer = make(tmp_path, MergeCallback(ExponentialMean(0.5)), losses, around, save_total_limit=1)
    trainer.train()
    trainer.train()
    assert loss(read(tmp_path, 8)) == losses.found[8]


class Unfreezing(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.requires_grad_(state.global_step >= 2)
        model.transformer.ln_f.requires_grad_(True)


def test_a_run_that_has_unfrozen_layers_resumes(tmp_path: Path) -> None:
    found = []
    for name, resumed in (("whole", None), ("again", str(tmp_path / "whole" / "checkpoint-4"))):
        frozen = model().requires_grad_(False)
        frozen.transformer.ln_f.requires_grad_(True)
        trainer = make(tmp_path / name, callback := MergeCallback(Mean()), Unfreezing(), of=frozen)
        trainer.train(resume_from_checkpoint=resumed)
        found.append(callback.merged_weights())
    assert len(found[0] or ()) > 2
    assert same(*found)


class ScheduleFree(torch.optim.SGD):
    def train(self) -> None:
        pass

    def eval(self) -> None:
        pass


def test_an_optimizer_that_writes_weights_for_evaluation_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, MergeCallback(Mean()))
    trainer.optimizer = ScheduleFree(trainer.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="MergeCallback does not work with ScheduleFree, which has weights of its own"):
        trainer.train()


def test_of_a_lora_model_the_adapters_alone_are_averaged_and_saved(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    callback, losses = MergeCallback(ExponentialMean(0.5)), Losses()
    trainer = make(tmp_path, callback, losses, of=peft.get_peft_model(model(), settings))
    trainer.train()
    merged = callback.merged_weights()
    assert merged
    assert all("lora_" in name for name in merged)
    folder = tmp_path / "checkpoint-4"
    assert not (folder / "model.safetensors").exists()
    assert loss(peft.PeftModel.from_pretrained(model(), folder)) == losses.found[4]
    again = make(
        tmp_path / "again", other := MergeCallback(ExponentialMean(0.5)), of=peft.get_peft_model(model(), settings)
    )
    again.train(resume_from_checkpoint=str(folder))
    assert same(trainer.model, again.model)
    assert same(callback.raw_weights(), other.raw_weights())


# ---- what the log has of the average

HEALTH = {"merged/updates", "merged/distance", "merged/start_share", "merged/decay"}


class Saying(Trainer):  # type: ignore[misc]
    """Logs a metric of its own, and a key that the callback has too."""

    def log(self, logs: Any, *args: Any, **kwargs: Any) -> None:
        super().log({**logs, "mine": 1.0}, *args, **kwargs)


def rows(trainer: Any, key: str) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if key in row]


def test_the_log_of_training_says_how_the_average_stands(tmp_path: Path) -> None:
    callback = MergeCallback(ExponentialMean(0.5), EveryNSteps(2, start=2))
    trainer = make(tmp_path, callback, kind=Saying, logging_strategy="steps", logging_steps=2)
    trainer.train()
    training = rows(trainer, "loss")
    assert [row.get("merged/updates") for row in training] == [None, 1, 2, 3]
    assert [row.get("merged/start_share") for row in training] == [None, 0.5, 0.25, 0.125]
    assert {row.get("merged/decay") for row in training} == {None, 0.5}
    merged, raw = callback.merged_weights() or {}, callback.raw_weights()
    # One set under two names, the head and the embedding, counts once.
    squares = [(merged[name] - raw[name]).square().sum() for name in raw]
    assert training[-1]["merged/distance"] == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-5)
    assert not any(HEALTH & row.keys() for row in trainer.state.log_history if "loss" not in row)
    assert all("mine" in row for row in training)


@pytest.mark.parametrize("options", [{}, {"log_health": False}, {"device": "cpu"}], ids=str)
def test_what_is_logged_of_it_changes_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    logged: dict[str, Any] = {"logging_strategy": "steps", "logging_steps": 1, "eval_strategy": "no", "max_steps": 3}
    trainer = make(tmp_path, callback := MergeCallback(ExponentialMean(0.5), **options), save_strategy="no", **logged)
    trainer.train()
    assert HEALTH & rows(trainer, "loss")[-1].keys() == (HEALTH if options.get("log_health", True) else set())
    other = MergeCallback(ExponentialMean(0.5), log_health=False)
    make(tmp_path, other, save_strategy="no", **{**logged, "logging_strategy": "no"}).train()
    assert same(callback.raw_weights(), other.raw_weights())
    assert same(callback.merged_weights(), other.merged_weights())


# ---- two processes


def on_two(root: Path) -> dict[str, Any]:
    trainer = make(
        root / "run", callback := MergeCallback(ExponentialMean(0.5)), losses := Losses(), ddp_backend="gloo"
    )
    trainer.train()
    again = make(root / "again", other := MergeCallback(ExponentialMean(0.5)), ddp_backend="gloo")
    again.train(resume_from_checkpoint=str(root / "run" / "checkpoint-2"))
    return {
        "steps": trainer.state.max_steps,
        "kind": type(trainer.model_wrapped).__name__,
        "losses": losses.found,
        "model": values(trainer.model),
        "raw": callback.raw_weights(),
        "resumed": same(trainer.model, again.model) and same(callback.raw_weights(), other.raw_weights()),
    }


@pytest.mark.multiprocess
def test_under_ddp_all_processes_evaluate_and_hold_what_the_first_one_saves(tmp_path: Path) -> None:
    first, second = launch(2, on_two, tmp_path)
    assert (first["steps"], first["kind"]) == (4, "DistributedDataParallel")
    assert first["losses"] == second["losses"]
    assert same(first["model"], second["model"])
    assert same(first["raw"], second["raw"])
    assert not same(first["raw"], first["model"])
    for step, found in first["losses"].items():
        assert loss(read(tmp_path / "run", step)) == pytest.approx(found, rel=1e-6)  # a mean over processes
    assert same(first["model"], read(tmp_path / "run", 4))
    assert (first["resumed"], second["resumed"]) == (True, True)


# ---- what is refused


def test_misuse_is_answered_at_construction() -> None:
    cases: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        ((0.999,), {}, TypeError, "`rule` must be a Rule"),
        ((ValleyMean(),), {}, ValueError, "`rule` must decide by no score"),
        ((Mean(), 3), {}, TypeError, "`schedule` must be a Schedule"),
        ((Mean(), None, "lora"), {}, TypeError, "`selection` must be a Selection"),
        ((Mean(), None, Selection(buffers="recompute")), {}, ValueError, "`selection` must have buffers='average'"),
        ((Mean(),), {"device": "disk"}, ValueError, "`device` must be None"),
        ((Mean(),), {"log_health": "yes"}, TypeError, "`log_health` must be"),
    ]
    for given, options, error, words in cases:
        with pytest.raises(error, match=words):
            MergeCallback(*given, **options)


def test_misuse_in_a_trainer_is_answered_when_training_begins(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a Trainer must have one MergeCallback, got 2"):
        make(tmp_path, MergeCallback(Mean()), MergeCallback(ExponentialMean())).train()
    trainer = make(tmp_path, MergeCallback(Mean()))
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="does not work with `deepspeed`"):
        refuse(trainer, MergeCallback(Mean()))
    for sharding in ("fsdp", "deepspeed"):  # asked for by arguments it is answered when the Trainer is made
        arguments = SimpleNamespace(**{"fsdp": None, "deepspeed": None, sharding: True})
        with pytest.raises(ValueError, match=f"does not work with `{sharding}` of TrainingArguments"):
            MergeCallback(Mean()).on_init_end(arguments, None, None)
    with pytest.raises(RuntimeError, match=r"must be a callback of a transformers\.Trainer that trains"):
        MergeCallback(Mean()).on_train_begin(None, None, None)


def test_a_checkpoint_of_merged_weights_alone_cannot_be_resumed_from(tmp_path: Path) -> None:
    make(tmp_path, MergeCallback(Mean()), save_only_model=True).train()
    with pytest.raises(
        ValueError, match=r"checkpoint-4 holds merged weights alone, since it was saved with `save_only"
    ):
        make(tmp_path, MergeCallback(Mean())).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_run_without_the_callback_can_be_gone_on_from_with_it(tmp_path: Path) -> None:
    make(tmp_path).train()
    make(tmp_path, callback := MergeCallback(Mean())).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert callback.averager is not None
    assert callback.averager.steps == 4
