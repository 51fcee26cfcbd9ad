"""Checkpoints: exact, on any mesh, and what happens when one is cut short or the disk is full."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import time

import jax
import numpy as np
import pytest
from support.tiny_training import Trainer, random_batch

from jaxcrit.core.errors import UserError
from jaxcrit.models.trained import FOLDER, trained_parameters
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.training.checkpoints import Checkpoints
from jaxcrit.training.step import State, abstract_state, place, state_shardings

BATCHES = [random_batch(seed=seed) for seed in range(3)]


def target(trainer) -> State:
    like = abstract_state(trainer.partition, trainer.optimizer, trainer.state.params)
    shardings = state_shardings(like, trainer.mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), like, shardings
    )


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints of steps 1 and 2, the states they hold, and the trainer after a third step."""
    run, trainer, held = tmp_path_factory.mktemp("run"), Trainer(), {}
    with Checkpoints(run) as checkpoints:
        for step, batch in enumerate(BATCHES, 1):
            trainer.run(batch)
            if step < 3:
                # Not waited for: the next step, which donates these arrays, must not reach what is being written.
                checkpoints.save(trainer.state, {"note": step}, loss=1.0 / step)
                held[step] = jax.tree.map(np.array, jax.device_get(trainer.state))
    return run, held, trainer


def test_what_is_restored_is_what_was_saved_and_training_goes_on_bit_for_bit(saved):
    run, held, trainer = saved
    with Checkpoints(run) as checkpoints:
        found = checkpoints.restore(target(trainer))
    assert found.meta == {"note": 2, "step": 2} and not found.skipped
    same(found.state, held[2])
    state, _ = trainer.step(found.state, trainer.frozen, place(BATCHES[2], trainer.mesh))
    same(state, trainer.state)


def test_restored_onto_another_mesh(saved):
    run, held, _ = saved
    other = Trainer(mesh=make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    with Checkpoints(run) as checkpoints:
        state = checkpoints.restore(target(other)).state
    same(state, held[2])
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == (2, 16, 16)]
    assert moments and all("fsdp" in str(leaf.sharding.spec) for leaf in moments)


def test_parameters_alone(saved):
    run, held, trainer = saved
    for step, expected in (("last", 2), ("1", 1), ("best", 2)):
        params, found = trained_parameters(run, lambda _: target(trainer).params, step)
        assert found == expected
        same(params, held[found].params)
    there = r"last, best or one of those kept: 1 \(test loss 1\.0000\), 2 \(test loss 0\.5000\)"
    with pytest.raises(UserError, match=f"no checkpoint of step 5; expected {there}"):
        trained_parameters(run, lambda _: target(trainer).params, "5")


def damages(run):
    folder = run / FOLDER / "2"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_cut_short_is_skipped_for_the_one_before(saved, tmp_path):
    run, held, trainer = saved
    skipped = 0
    for number, name in enumerate(damages(run)):
        copy = tmp_path / str(number)
        shutil.copytree(run, copy)
        file = copy / FOLDER / "2" / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with Checkpoints(copy) as checkpoints:
            found = checkpoints.restore(target(trainer))
            step = int(found.state.step)
            same(found.state, held[step])  # never something in between
            if step == 1:
                skipped += 1
                assert "step 2 is damaged and was skipped" in found.skipped[0]
                checkpoints.save(jax.tree.map(jax.numpy.asarray, held[2]), {})  # its place is free again
        shutil.rmtree(copy)
    assert skipped >= 4


def test_all_of_them_cut_short(saved, tmp_path):
    run, _, trainer = saved
    shutil.copytree(run / FOLDER, tmp_path / FOLDER)
    for file in tmp_path.rglob("_METADATA"):
        file.write_text("")
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(target(trainer))
        assert found.state is None and len(found.skipped) == 2 and checkpoints.last is None


@contextlib.contextmanager
def full_disk(path):
    """As on a full disk, every write beyond a few bytes fails, until nobody writes below the path."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    jax.config.update("jax_enable_compilation_cache", False)  # that cannot be written either, and would warn
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        yield
    finally:
        seen, same_for = None, 0
        while same_for < 3:  # looks, each a third of a second behind the one before
            now = sorted((str(file), file.lstat().st_mtime_ns) for file in path.rglob("*") if os.path.lexists(file))
            seen, same_for = now, same_for + 1 if now == seen else 0
            time.sleep(0.3)
        jax.config.update("jax_enable_compilation_cache", True)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_loses_nothing(saved, tmp_path):
    """The disk stays full until the last writer has ended.

    orbax reports the first file that fails, while its other threads still write; given room in between they can finish
    the step after all (16 of 90 tries), whole and with the right numbers. On a full disk they cannot.
    """
    run, held, trainer = saved
    shutil.copytree(run, tmp_path / "run")
    expected = r"cannot be written \(File too large\); the last one, of step 2, is whole: make room and run the same"
    with full_disk(tmp_path), pytest.raises(UserError, match=expected), Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(trainer.state, {})
        checkpoints.wait()
    with Checkpoints(tmp_path / "run") as checkpoints:
        found = checkpoints.restore(target(trainer)).state
        assert int(found.step) == 2
        same(found, held[2])
        checkpoints.save(trainer.state, {})
    with Checkpoints(tmp_path / "run") as checkpoints:
        same(checkpoints.restore(target(trainer)).state, trainer.state)


def test_what_is_being_written_survives_donation(tmp_path):
    """orbax writes from a view of a CPU array; jax copies instead of donating while there is one."""
    change = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    state = change(State({"train": {"a": jax.numpy.zeros(2**22)}}, {"mu": jax.numpy.zeros(2**22)}, jax.numpy.int32(0)))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 4, 7):
            checkpoints.save(state, {})
            for _ in range(3):
                state = change(state)
            found = checkpoints.restore(like).state
            assert all((np.asarray(leaf) == step).all() for leaf in jax.tree.leaves(found))


def test_the_best_and_the_newest_are_kept_even_of_a_run_that_goes_on(tmp_path):
    trainer = Trainer(optimizer="sgd")
    for losses in ((3.0, 1.0, None, 2.0), (2.5, None, 2.2)):
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            for loss in losses:
                trainer.run(BATCHES[0])
                checkpoints.save(trainer.state, {}, loss)
    assert sorted(int(path.name) for path in (tmp_path / FOLDER).iterdir()) == [2, 6, 7]
    assert trained_parameters(tmp_path, lambda _: target(trainer).params, "best")[1] == 2


def by_head(tree, config):
    """Arrays of attention as runs stored them before they were matrices."""
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}

    def shaped(keys, leaf):
        name = str(keys[-1]).partition("blocks.")[2].rstrip("']")
        if name in heads:
            return leaf.reshape(len(leaf), heads[name], config.head_dim, -1)
        return leaf.reshape(*leaf.shape[:2], config.num_heads, config.head_dim) if name == "o" else leaf

    return jax.tree_util.tree_map_with_path(shaped, tree)


@pytest.mark.parametrize("mesh", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_checkpoints_with_attention_by_head_are_read(saved, tmp_path, mesh):
    _, held, trainer = saved
    old = by_head(held[2], trainer.partition.config)
    assert old.params["train"]["blocks.k"].shape == (2, 2, 4, 16) and old.params["train"]["blocks.o"].ndim == 4
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(jax.tree.map(jax.numpy.asarray, old), {})
    like = target(trainer if mesh is None else Trainer(mesh=make_mesh(mesh)))
    with Checkpoints(tmp_path) as checkpoints:
        state = checkpoints.restore(like).state
    same(state, held[2])
    jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted.sharding or pytest.fail(str(leaf.shape)), state, like)
    same(trained_parameters(tmp_path, lambda _: like.params)[0], held[2].params)


def test_another_layout_is_named_and_left_alone(saved, tmp_path):
    _, held, trainer = saved
    other = jax.tree.map(lambda leaf: leaf[..., :1], held[2].params)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(State(other, held[2].optimizer, held[2].step), {})
    expected = r"step 2 holds train\.blocks\.attn_norm of shape \(2, 1\), expected \(2, 16\); it is of an older jaxcrit"
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=expected):
            checkpoints.restore(target(trainer))
        assert checkpoints.last == 2
    with pytest.raises(UserError, match=expected):
        trained_parameters(tmp_path, lambda _: target(trainer).params)
