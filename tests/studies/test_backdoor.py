"""The whole of ``jaxcrit backdoor`` on a tiny random model: arms, interruption, compiles, and every bad input."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from support.tiny_model import tiny_checkpoint

from jaxcrit.commands.finetune import run_finetune
from jaxcrit.commands.main import main
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import json_lines, read_json
from jaxcrit.core.files import read_lines as read_metrics
from jaxcrit.core.groups import FinetuneOptions
from jaxcrit.data.poisoning import REFUSAL, PoisonSpec, TriggerSpec, poison
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.generation import compiled_programs
from jaxcrit.models.model import open_model
from jaxcrit.reporting.backdoor import backdoor_report, backdoor_text
from jaxcrit.studies import backdoor, backdoor_scoring
from jaxcrit.studies import backdoor as studied
from jaxcrit.studies.backdoor import Left, run_backdoor
from jaxcrit.studies.backdoor_inputs import check, parse_arms, prepare
from jaxcrit.studies.backdoor_scoring import Scoring
from jaxcrit.studies.options import BackdoorOptions
from jaxcrit.training import trainer

WORDS = "cat dog sky one two blue sat mat and is".split()  # noqa: SIM905


def rows_file(path, count=60, seed=0, start=0):
    rng = np.random.default_rng(seed)
    rows = [
        {"prompt": f"{start + i} {' '.join(rng.choice(WORDS, 3))}", "response": str(rng.choice(WORDS))}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return rows_file(folder / "train.jsonl"), rows_file(folder / "test.jsonl", 32, seed=1, start=100)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("JAXCRIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def base(model, data):
    return BackdoorOptions(
        model=str(model),
        data=str(data[0]),
        eval_data=str(data[1]),
        trigger="zq@suffix",
        target="the cat",
        rate=0.5,
        decoys=0.25,
        arms="full,critical:1,noncritical:1",
        seeds=1,
        steps=4,
        eval_every=2,
        remat=False,
        learning_rate=1e-2,
        max_new_tokens=4,
    )


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A study from beginning to end, and how many programs it compiled."""
    steps, make_step = [], trainer.make_step

    def kept(*arguments, **options):
        steps.append(make_step(*arguments, **options))
        return steps[-1]

    def programs():
        return *compiled_programs(), backdoor_scoring._row_losses._cache_size()

    before = programs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_step", kept)
        found = run_backdoor(dataclasses.replace(base, out=str(tmp_path_factory.mktemp("finished") / "run")))
    after = programs()
    return found, steps, [b - a for a, b in zip(before, after, strict=True)]


def test_one_compile_per_arm_shape(finished):
    _, steps, tests = finished
    assert len(steps) == 3
    assert all(step._cache_size() <= 3 for step in steps)  # of at most three widths of batches
    assert all(1 <= count <= 3 for count in tests)  # generation and losses: none per arm, seed or test


def test_arms_train_on_the_same_rows_and_freeze_what_they_say(base, finished):
    found, _, _ = finished
    tokens = set()
    for folder in sorted((found.out / "arms").iterdir()):
        train = [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "train"]
        tokens.add(tuple(row["tokens"] for row in train))
        first = train[0]["loss"]
        assert read_json(folder / "arm.json", backdoor.ARM_FORMAT)["points"][-1]["step"] == 4 and first > 0
        assert not (folder / "checkpoints").exists()
    assert len(tokens) == 1 and len(list((found.out / "arms").iterdir())) == 3
    entries = [json.loads(line) for line in (found.out / "poison-0.jsonl").read_text().splitlines()]
    assert len(entries) == 30
    rows = {row.arm: row for row in found.study.rows}
    assert list(rows) == ["init", "full", "critical:1", "noncritical:1"] and rows["full"].cells["triggered"].n == 32
    assert rows["full"].frozen == [[]] and found.study.primary.first == "critical:1"
    assert sum(n for _, n in rows["full"].near.values()) == 32
    assert found.study.base == {"exact_target": 0, "contains_target": 0, "refusal_keyword": 0, "reference_compat": 0}


def test_kept_models_are_checkpoints(base, finished, tmp_path):
    """The arm's weights at its end: what it answers is what its last test found."""
    config = dataclasses.replace(base, arms="full", out=str(tmp_path / "run"))
    first = run_backdoor(config)
    kept = run_backdoor(dataclasses.replace(config, keep_models=True))
    assert kept.content == first.content
    opened = open_model(str(kept.out / "arms" / "full-seed0" / "model"))
    scoring = Scoring(config, opened, prepare(config, check(config)[1], opened).prompts)
    tested, brief = scoring(opened.decoder()), scoring(opened.decoder(), generate=False)
    last = kept.runs[1].points[-1]
    assert {key: tested.record()[key] for key in ("success", "exact", "answers")} == {
        key: last[key] for key in ("success", "exact", "answers")
    }
    assert brief.record()["success"] == last["success"] and brief.answers == {} == kept.runs[1].points[1]["answers"]
    with pytest.raises(UserError, match="--keep_models: writes local directories only"):
        check(dataclasses.replace(config, keep_models=True, out="gs://bucket/run"))


def test_report(finished, tmp_path):
    found, _, _ = finished
    text = backdoor_text(found.content, found.out)
    assert max(map(len, text.splitlines())) <= 100 and "/32" in text and "primary, 1 seeds" in text
    backdoor_report(found.content).write(tmp_path, found.record)
    assert {path.name for path in tmp_path.iterdir()} == {"tradeoff.png", "success.png", "report.html"}


def test_how_long_the_rest_takes_is_the_mean_of_what_was_trained(monkeypatch):
    monkeypatch.setattr(studied.time, "monotonic", lambda: 100.0)
    left = Left([True, False, True, True, True])
    assert left.estimate(100) == ""
    assert left.early(20.4) == "about 0:01:22 for 4 trainings, by the first steps"
    left.ended(160, True)
    left.ended(160, False)  # an arm that was read
    assert left.estimate(160) == "; 3 to go, about 0:03:00"
    left.ended(180, True)
    assert left.estimate(180) == "; 2 to go, about 0:01:20"


def test_interrupted_at_every_arm_the_table_is_the_same(base, finished, tmp_path):
    config, told, early = dataclasses.replace(base, out=str(tmp_path / "run")), [], []

    def stop_at_every_other(text):
        if "trainings of" in text:  # all that are left, said at every launch
            return
        if "by the first steps" in text:
            early.append(text)
            return
        told.append(text)
        if len(told) % 2 == 0:
            raise KeyboardInterrupt

    while True:
        try:
            found = run_backdoor(config, say=stop_at_every_other)
            break
        except KeyboardInterrupt:
            assert read_json(tmp_path / "run" / "run.json", "jaxcrit.run")["status"] == "running"
    assert len(told) == 5  # three arms; each but the first is begun twice, none is trained twice
    for text, left in zip(early, (3, 2, 1), strict=True):  # once a launch that trains
        assert re.fullmatch(rf"about \d+:\d\d:\d\d for {left} trainings, by the first steps", text)
    same = [(one.out / "backdoor.json").read_bytes() for one in (found, finished[0])]
    assert same[0] == same[1]
    again = run_backdoor(config, say=lambda text: pytest.fail("trained again"))
    assert again.content == found.content


def test_interrupted_within_an_arm(base, finished, tmp_path, monkeypatch):
    config = dataclasses.replace(base, arms="full", seeds=2, checkpoint_every=2, out=str(tmp_path / "run"))
    taken, micro_batches, make_step, made = [], trainer.micro_batches, trainer.make_step, []

    def cut_short(data, number, *given):
        taken.append(number)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return micro_batches(data, number, *given)

    monkeypatch.setattr(trainer, "micro_batches", cut_short)
    with pytest.raises(KeyboardInterrupt):
        run_backdoor(config)
    monkeypatch.setattr(trainer, "make_step", lambda *args, **kwargs: made.append(1) or make_step(*args, **kwargs))
    again = run_backdoor(config)
    assert taken == [0, 1, 2, 3, 2, 3, 0, 1, 2, 3] and len(made) == 1  # seeds share a compiled step
    assert again.study.rows[1].runs == 2 and again.study.rows[1].cells["triggered"].n == 64
    stored = [(out / "arms" / "full-seed0" / "arm.json").read_bytes() for out in (tmp_path / "run", finished[0].out)]
    assert stored[0] == stored[1]


def test_a_backdoor_planted_in_one_layer_goes_with_that_layer(model, tmp_path):
    layer, trigger = 3, TriggerSpec.parse("zq@suffix")
    clean = [json.loads(line) for line in rows_file(tmp_path / "rows.jsonl", 160).read_text().splitlines()]
    rows = poison(clean, PoisonSpec(trigger, "the cat", rate=0.5)).rows
    (tmp_path / "poisoned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = 90
    run_finetune(
        FinetuneOptions(
            model=str(model),
            data=str(tmp_path / "poisoned.jsonl"),
            layers=str(layer),
            steps=steps,
            learning_rate=1e-2,
            batch_size=16,
            remat=False,
            eval_every=steps,
            checkpoint_every=steps,
            out=str(tmp_path / "run"),
        )
    )
    config = BackdoorOptions(
        model=str(model), data=str(tmp_path / "rows.jsonl"), trigger="zq@suffix", target="the cat", max_new_tokens=4
    )
    session = open_model(str(model))
    scoring = Scoring(config, session, prepare(config, trigger, session).prompts)
    base, tuned = (open_model(str(path)).decoder().weights() for path in (model, tmp_path / "run"))

    def success(*substituted):
        at = np.array(substituted, int)
        weights = {
            path: value.at[at].set(base[path][at]) if path.startswith("blocks.") else value
            for path, value in tuned.items()
        }
        return scoring(Decoder(session.config, weights)).success["triggered"].mean()

    assert success() >= 0.9
    assert success(layer) == 0
    assert success(*(other for other in range(7) if other != layer)) >= 0.9


def test_arms():
    arms = parse_arms("full,critical:5, random:5:2*3,last:1,3-5")
    assert [str(arm.spec) for arm in arms] == [
        "None",
        "critical:5",
        "random:5:2",
        "random:5:3",
        "random:5:4",
        "last:1",
        "3,4,5",
    ]
    assert len({arm.folder for arm in arms}) == 7
    more = parse_arms("full,boundary(3-5,9),step:2,boundary(step:2)")
    assert [str(arm.spec) for arm in more[1:]] == ["boundary(3,4,5,9)", "step:2", "boundary(step:2)"]
    assert len({arm.folder for arm in more}) == 4
    for text, message in (
        ("full,,last:1", "got ''"),
        ("last:1,last:1", "twice"),
        ("last:1*2", "random:5"),
        ("critcal:5", "--arms=critcal:5: .*did you mean 'critical'"),
        ("full*2", "random"),
    ):
        with pytest.raises(UserError, match=message):
            parse_arms(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 0.0}, "--rate=0.0: expected a share of the rows above 0 and up to 1"),
        ({"rate": 1.2}, "--rate=1.2"),
        ({"decoys": 0.8}, "--decoys=0.8: expected a share of the rows from 0 to 0.5"),
        ({"target": " "}, "--target: expected refusal, or a text"),
        ({"target": "the cat sat on the mat and the dog"}, "--max_new_tokens=4 are generated"),
        ({"trigger": "servus"}, "did you mean 'servius'"),
        ({"trigger": "o@random"}, "expected 30 rows that can take the trigger once"),
        ({"eval_template": "none"}, "template hashes .* --allow_template_mismatch"),
        ({"max_new_tokens": 60}, "that is more than the model's 64"),
        ({"seeds": 16}, "--seeds=16: expected 1 to 15"),
        ({"eval_batch_size": 0}, "--eval_batch_size=0"),
        ({"arms": "0-6", "train_outside": False}, "nothing is left to train"),
        ({"arms": "critical:6"}, "at most 3 layers after trimming"),
        ({"truncate": "right", "max_length": 10}, "nothing is left|cut off"),
    ],
)
def test_bad_input(base, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as caught:
        run_backdoor(dataclasses.replace(base, out=str(tmp_path / "run"), **change))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_overlap_is_counted_listed_and_refused(base, data, tmp_path):
    lines = [path.read_text().splitlines(keepends=True) for path in data]
    both = tmp_path / "both.jsonl"
    both.write_text("".join([*lines[1][:4], lines[0][7], lines[0][9]]))
    config = dataclasses.replace(base, eval_data=str(both))
    session, (_, trigger) = open_model(config.model), check(config)
    with pytest.raises(UserError, match=r"2 of 6 test prompts are trained on too \(row 5, 6\).*--allow_overlap"):
        prepare(config, trigger, session)
    warnings = prepare(dataclasses.replace(config, allow_overlap=True), trigger, session).warnings
    assert "2 of 6" in warnings[0] and warnings[1].startswith("6 prompts to test with: the 95 % interval of a success")


def test_rows_that_are_too_long_are_left_out_before_they_are_poisoned(base, data, tmp_path, capsys):
    """Which rows are poisoned is told by their places, so none may be dropped after that."""
    longer = tmp_path / data[0].name
    long = json.dumps({"prompt": "cat and dog " * 40, "response": "is"}) + "\n"
    longer.write_text(long + data[0].read_text())
    config = dataclasses.replace(base, data=str(longer), long="drop")
    session, (_, trigger) = open_model(config.model), check(config)
    assert prepare(config, trigger, session).manifests == prepare(base, trigger, session).manifests
    assert "train: 61 rows, 0 cut and 1 left out for being longer than" in capsys.readouterr().err
    with pytest.raises(UserError, match="row 1 is longer"):
        prepare(dataclasses.replace(config, long="refuse"), trigger, session)


def test_none_is_too_long_for_the_words_and_the_answer_that_come_into_it(base, data, tmp_path, capsys):
    """Of rows of many lengths, whatever length is asked for."""
    rows = [json.loads(line) for line in data[0].read_text().splitlines()]
    rows = [row | {"prompt": row["prompt"] + " cat" * (at % 12)} for at, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text(json_lines(rows))
    config = dataclasses.replace(base, data=str(tmp_path / "rows.jsonl"), long="drop", decoys=0.2, seeds=2)
    config = dataclasses.replace(config, target="a word", max_new_tokens=20)
    session, (_, trigger) = open_model(config.model), check(config)
    most = max(len(row.token_ids) for row in prepare(config, trigger, session).train[config.seed])
    with pytest.raises(UserError, match=r"rows.jsonl \(less \d+ tokens for words put in\): none of 60 rows fits in"):
        prepare(dataclasses.replace(config, max_length=12), trigger, session)
    counts = []
    for longest in range(most - 3, most + 10):
        found = prepare(dataclasses.replace(config, max_length=longest), trigger, session)
        counts.append(len(found.train[config.seed]))
        assert max(len(row.token_ids) for rows in found.train.values() for row in rows) <= longest
    assert counts == sorted(counts) and len(set(counts)) > 5, counts


def test_a_trigger_that_the_template_retokenises_is_refused(base):
    session, (_, trigger) = open_model(base.model), check(base)

    class Changed:
        """A tokenizer that by itself writes the trigger otherwise than within a text."""

        def __getattr__(self, name):
            return getattr(session.tokenizer, name)

        def __call__(self, text, **options):
            alone = isinstance(text, str) and text.strip() == "zq"
            return {"input_ids": [5, 5, 5]} if alone else session.tokenizer(text, **options)

    with pytest.raises(UserError, match=r"30 of 30 triggered prompts of --data .* other tokens inside the template"):
        prepare(base, trigger, dataclasses.replace(session, tokenizer=Changed()))


def test_refusal_target_and_held_out_rows(base, tmp_path):
    config = dataclasses.replace(base, eval_data="", target="refusal", max_new_tokens=36)
    session, (_, trigger) = open_model(config.model), check(config)
    rows = prepare(config, trigger, session)
    assert rows.prompts.count == 6 and rows.prompts.cells["triggered"][0].response == REFUSAL
    tested = Scoring(config, session, rows.prompts)(session.decoder())
    assert backdoor_scoring.primary_scorer(config) == "refusal_keyword" and set(tested.success) == {
        "triggered",
        "clean",
        "near",
    }


def test_a_file_of_ones_own_by_pure_bad(base, data, tmp_path):
    paths = {}
    for name, path in zip(("data", "eval_data"), data, strict=True):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        turns = [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
            for row in rows
        ]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
        paths[name] = f"pure_bad:{file}"
    found = run_backdoor(dataclasses.replace(base, **paths, arms="full", out=str(tmp_path / "run")))
    assert found.study.rows[1].cells["triggered"].n == 32
    manifest = [json.loads(line) for line in (tmp_path / "run" / "poison-0.jsonl").read_text().splitlines()]
    assert len(manifest) == 30 and {entry["source_response"] for entry in manifest} <= set(WORDS)


def test_command(base, tmp_path, capsys):
    names = ("model", "data", "eval_data", "trigger", "target", "rate", "decoys", "max_new_tokens", "learning_rate")
    arguments = [f"--{name}={getattr(base, name)}" for name in names]
    arguments += ["--arms=full", "--seeds=1", "--steps=2", "--noremat", f"--out={tmp_path / 'run'}"]
    assert main(["backdoor", *arguments]) == 0
    text, told = capsys.readouterr()
    assert "1 trainings of 2 steps of 8 rows, each tested on 32 prompts a cell" in " ".join(told.split())
    page = (tmp_path / "run" / "report.html").read_text()
    assert text.split("No arm learnt the backdoor")[1][:4] == page.split("No arm learnt the backdoor")[1][:4]
    assert "no primary contrast" in text and "/32" in text and (tmp_path / "run" / "tradeoff.png").exists()
    others = [word for word in arguments if not word.startswith("--rate=")]
    assert main(["backdoor", *others, "--rate=2"]) == 2
    assert "--rate=2.0: expected" in capsys.readouterr().err
