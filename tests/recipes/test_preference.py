"""Preference tuning: what is read, what is refused, what DPO computes, and that its recipes start from each other."""

import gzip
import json
import math
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_merge.callbacks import WARP
from lightning_merge.cli import main
from lightning_merge.recipes import DPO, RLOO, LanguageModel, Preferences, RewardModel
from lightning_merge.recipes._catalog import recipes
from lightning_merge.recipes.preference._causal_lm import Bytes
from lightning_merge.recipes.preference._files import Pair, read_pairs
from lightning_merge.recipes.preference._language_model import answer_log_probabilities
from lightning_merge.recipes.preference._tokens import IGNORED, PairTokens, collate

CONFIG = {
    "model_type": "gpt2",
    "vocab_size": 258,
    "n_positions": 32,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 1,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
SMALL: dict[str, Any] = {"length": 32, "answer": 16, "batch_size": 4}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def dialogue(i: int, answer: str) -> str:
    return f"\n\nHuman: What is {i} and {i}?\n\nAssistant: {answer}"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Forty pairs and a text."""
    rows = [{"chosen": dialogue(i, f"It is {2 * i}."), "rejected": dialogue(i, "No idea.")} for i in range(40)]
    with gzip.open(tmp_path / "pairs.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "text.txt").write_text("All work and no play. " * 200)
    return {"pairs": str(tmp_path / "pairs.jsonl.gz"), "text": str(tmp_path / "text.txt")}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# ---- pairs


def test_the_prompt_is_what_both_dialogues_begin_with_up_to_the_last_answer(tmp_path: Path) -> None:
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    path = lines(
        tmp_path / "p.jsonl",
        {"chosen": start + " yes, this", "rejected": start + " yes, that"},
        {"prompt": "Q", "chosen": "x", "rejected": "y"},
        {"chosen": "same start, one", "rejected": "same start, two"},
    )
    assert read_pairs(path) == [
        Pair(start, " yes, this", " yes, that"),
        Pair("Q", "x", "y"),
        Pair("same start, ", "one", "two"),
    ]


def test_pairs_that_say_nothing_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = lines(
        tmp_path / "p.jsonl",
        {"prompt": "Q", "chosen": "x", "rejected": "y"},
        {"prompt": "Q", "chosen": " ", "rejected": "y"},
        {"prompt": "Q", "chosen": "x", "rejected": "x"},
        {"prompt": "Q", "chosen": "z", "rejected": "z"},
    )
    with caplog.at_level("INFO"):
        assert len(read_pairs(path)) == 1
    assert "left out 1 pairs with an empty answer and 2 with two equal answers" in caplog.text


GOOD = {"chosen": "x", "rejected": "y"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "x"}, "line 2 lacks `rejected`; it has: chosen"),
        ({"rejected": "x", "answer": "y"}, "line 2 lacks `chosen`; it has: rejected, answer"),
        ("{broken", "line 2 is not JSON"),
        ([1, 2], "line 2 must be an object with `chosen` and `rejected`, got list"),
        ({"chosen": "x", "rejected": 3}, "`rejected` in .*line 2 must be text, got int"),
    ],
)
def test_a_bad_line_is_named(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_pairs(lines(tmp_path / "p.jsonl", GOOD, row))


def test_files_without_pairs_or_absent_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no pair of two different answers \(0 with an empty one, 1 equal\)"):
        read_pairs(lines(tmp_path / "p.jsonl", {"prompt": "Q", "chosen": "x", "rejected": "x"}))
    with pytest.raises(FileNotFoundError, match=r"`pairs`: there is no file .*--data.pairs FILE"):
        read_pairs(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_on": "both"}, "`train_on` must be"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"length": 4}, "`length` must be at least 8, got 4"),
        ({"answer": 192}, r"`answer` must be at least 1 and less than `length` \(192\), got 192"),
        ({"val_share": 1.0}, r"`val_share` must be in \(0, 1\), got 1.0"),
        ({"train_on": "text"}, "--data.text FILE"),
        ({"pairs": None}, "--data.pairs FILE"),
    ],
)
def test_bad_settings_of_the_data_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preferences(**{"pairs": "p.jsonl", **settings})


def test_held_out_pairs_are_neither_trained_on_nor_in_the_dialogues(files: dict[str, str]) -> None:
    tuned, taught = Preferences(pairs=files["pairs"], **SMALL), Preferences(files["pairs"], train_on="chosen", **SMALL)
    for data in (tuned, taught):
        data.setup("fit")
    assert (len(tuned.train), len(tuned.val_pairs)) == (32, 8)
    text = Bytes().decode(taught.train.tokens.flatten().tolist())
    train, held_out = tuned._split_pairs()
    assert sum(pair.prompt in text for pair in train) >= 31  # the last may be cut
    assert not any(pair.prompt in text for pair in held_out)


def test_only_answers_are_labels_and_long_ones_are_cut() -> None:
    rows = PairTokens([Pair("abc", "de", "x" * 50)], Bytes(), length=12, answer=6)
    tokens, labels = rows[0]["tokens"], rows[0]["labels"]
    assert tokens[0].tolist() == [256, *b"abcde", *[256] * 6]
    assert labels[0].tolist() == [IGNORED] * 4 + [*b"de", 256] + [IGNORED] * 5
    assert tokens[1].tolist() == [256, *b"abcxxxxxx", 256, 256]
    assert (labels[1] != IGNORED).sum() == 6
    assert collate([rows[0]])["tokens"].shape == (1, 2, 10)


# ---- DPO


def test_answer_log_probabilities_sum_over_the_labels() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]]))
    labels = torch.tensor([[IGNORED, 1, 0]])
    assert answer_log_probabilities(logits, labels).item() == pytest.approx(math.log(0.5 * 0.25))


def trained(files: dict[str, str], path: Path) -> str:
    module = LanguageModel(config=CONFIG)
    run = Trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=1, **QUIET)
    run.fit(module, Preferences(**files, train_on="text", **SMALL))
    run.save_checkpoint(path)
    return str(path)


def test_dpo_starts_from_the_file_and_measures_against_it(files: dict[str, str], tmp_path: Path) -> None:
    start = trained(files, tmp_path / "sft.ckpt")
    module = DPO(start, config=CONFIG, beta=0.1, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    data = Preferences(files["pairs"], **SMALL)
    before = Trainer(**QUIET).validate(module, data, verbose=False)
    found = {key: value for part in before for key, value in part.items()}
    assert found["val/loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert found["val/acc"] == 0.5
    assert found["val/margin"] == 0

    assert not any("frozen" in name for name in module.state_dict())
    reference = {name: t.clone() for name, t in module._frozen[0].state_dict().items()}
    run = Trainer(max_epochs=4, **QUIET)
    run.fit(module, data)
    assert run.callback_metrics["val/acc"] > 0.9
    assert run.callback_metrics["val/margin"] > 0
    assert all(torch.equal(t, reference[name]) for name, t in module._frozen[0].state_dict().items())


def test_the_margin_is_beta_times_the_difference_of_log_ratios(files: dict[str, str], tmp_path: Path) -> None:
    module = DPO(trained(files, tmp_path / "sft.ckpt"), config=CONFIG, beta=0.3).eval()
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 10)
    data = Preferences(files["pairs"], **SMALL)
    data.setup("fit")
    row = data.val_pairs[0]

    def log_probability(model: Any, i: int) -> Tensor:
        tokens, labels = row["tokens"][i], row["labels"][i]
        logs = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
        return sum(logs[t - 1, labels[t]] for t in range(1, len(labels)) if labels[t] != IGNORED)

    ratios = [log_probability(module.model, i) - log_probability(module._frozen[0], i) for i in range(2)]
    batch = {key: value[None] for key, value in row.items()}
    assert 0.3 * module._margins(batch, "val").item() == pytest.approx(0.3 * (ratios[0] - ratios[1]).item(), rel=1e-4)


def test_bad_starts_are_refused(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`beta` must be above 0, got 0"):
        DPO("x.ckpt", beta=0)
    with pytest.raises(ValueError, match="`start` must be a checkpoint of preference/sft"):
        DPO()
    torch.save({"state_dict": {"weight": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"lacks `model\.transformer.*recipe before this one"):
        DPO(str(tmp_path / "other.ckpt"), config=CONFIG)


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-merge\[preference\]"'):
        LanguageModel(config=CONFIG)


# ---- RLOO


@pytest.fixture
def policy(files: dict[str, str], tmp_path: Path) -> RLOO:
    start = trained(files, tmp_path / "sft.ckpt")
    reward = RewardModel(start, config=CONFIG)
    run = Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, **QUIET)
    run.fit(reward, Preferences(files["pairs"], **SMALL))
    run.save_checkpoint(tmp_path / "reward.ckpt")
    return RLOO(start, str(tmp_path / "reward.ckpt"), CONFIG, samples=4, answer=8, kl=0.0)


def test_a_reward_model_learns_pairs(files: dict[str, str], tmp_path: Path) -> None:
    reward = RewardModel(config=CONFIG, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    run = Trainer(max_epochs=5, **QUIET)
    run.fit(reward, Preferences(files["pairs"], **SMALL))
    assert run.callback_metrics["val/acc"] > 0.9


def test_samples_continue_the_prompts_and_end_once(policy: RLOO, files: dict[str, str]) -> None:
    data = Preferences(files["pairs"], **SMALL)
    data.setup("fit")
    batch = collate([data.train[i] for i in range(3)])
    torch.manual_seed(0)
    tokens, labels = policy.sample(batch, 2)
    assert len(tokens) == 6
    for i, (row, label) in enumerate(zip(tokens, labels, strict=True)):
        begin = int((batch["labels"][i // 2, 0] != IGNORED).float().argmax())
        first = int((label != IGNORED).float().argmax())
        assert row[first - begin : first].tolist() == batch["tokens"][i // 2, 0, :begin].tolist()
        answer = label[label != IGNORED].tolist()
        assert 1 <= len(answer) <= 8
        assert 256 not in answer[:-1]


def test_policy_gradient_raises_the_reward(policy: RLOO, files: dict[str, str]) -> None:
    class Letters(torch.nn.Module):
        """Rewards how many bytes of an answer are below 128."""

        def rewards(self, tokens: Tensor, labels: Tensor) -> Tensor:
            return ((labels >= 0) & (labels < 128)).float().sum(1)

    policy._frozen[1] = Letters()
    policy.optimizer = lambda p: torch.optim.AdamW(p, lr=3e-2)
    run = Trainer(max_epochs=3, limit_val_batches=0, **QUIET)
    data = Preferences(files["pairs"], **SMALL)
    data.setup("fit")
    batch = collate([data.train[i] for i in range(16)])

    def mean_reward() -> float:
        torch.manual_seed(0)
        return policy._frozen[1].rewards(*policy.sample(batch, 4)).mean().item()

    before = mean_reward()
    run.fit(policy, data)
    assert mean_reward() > before + 1


def test_the_reference_may_be_the_anchor_of_the_branch_that_trains(policy: RLOO, files: dict[str, str]) -> None:
    def ratios(anchor: str | None) -> list[float]:
        module = deepcopy(policy)
        module.anchor = anchor
        for dropout in (each for each in module.modules() if isinstance(each, torch.nn.Dropout)):
            dropout.p = 0.0
        found: list[float] = []
        module.log_dict = lambda logged: found.append(float(logged["train/kl"]))  # type: ignore[assignment, misc]
        warp = WARP(2, every_n_steps=2, decay=0.0)  # the anchor of a branch is where its last step ended
        run = Trainer(max_epochs=1, limit_train_batches=4, limit_val_batches=0, callbacks=[warp], **QUIET)
        run.fit(module, Preferences(files["pairs"], **SMALL))
        return found

    assert ratios("warp") == pytest.approx([0.0] * 4, abs=1e-6)
    assert max(map(abs, ratios(None)[2:])) > 1e-5  # each branch has taken a step away from the start


def test_bad_arguments_of_rloo_are_refused(policy: RLOO, files: dict[str, str], tmp_path: Path) -> None:
    start, reward = str(tmp_path / "sft.ckpt"), str(tmp_path / "reward.ckpt")
    for argument, value in {"samples": 1, "answer": 0, "kl": -0.1}.items():
        with pytest.raises(ValueError, match=f"`{argument}` must be at least .*, got {value}"):
            RLOO(start, reward, CONFIG, **{argument: value})
    with pytest.raises(ValueError, match="`clip` must be above 0"):
        RLOO(start, reward, CONFIG, clip=0)
    with pytest.raises(ValueError, match="holds no reward model"):
        RLOO(start, start, CONFIG)


# ---- recipes


def test_the_recipes_start_from_each_other(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    chain = ("base", "sft", "dpo", "dpo-ondare", "dpo-onties", "reward", "rloo", "rloo-ondare", "rloo-warp")
    assert {f"preference/{name}" for name in chain} <= recipes().keys()
    for name in chain:
        options = {
            "trainer.limit_train_batches": 2,
            "trainer.limit_val_batches": 1,
            "trainer.enable_progress_bar": "false",
            "model.config": json.dumps(CONFIG),
            "data.length": 32,
            "data.answer": 16,
            "data.batch_size": 4,
            **({"model.answer": 8, "model.samples": 2} if name.startswith("rloo") else {}),
            **({"data.text": files["text"]} if name == "base" else {"data.pairs": files["pairs"]}),
        }
        assert main(["run", f"preference/{name}", *(f"--{key}={value}" for key, value in options.items())]) == 0
        assert (tmp_path / f"runs/preference/{name}/version_0/checkpoints/last.ckpt").is_file()
        assert "│ raw" in capsys.readouterr().out
