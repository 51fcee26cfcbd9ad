"""The sweep of every dataset of an analysis: from the run's fingerprint, from given states, or from forward passes."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxcrit.core import console, processes
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import write_npz
from jaxcrit.core.groups import AnalyzeOptions
from jaxcrit.core.rundir import RunDirectory
from jaxcrit.data.batches import common_shapes, make_batches, refuse_equal_prompts
from jaxcrit.data.dataset import Dataset
from jaxcrit.data.templates import template_hash
from jaxcrit.evidence.capture import capture, compiled_steps, stream
from jaxcrit.evidence.fingerprint import FINGERPRINT_FORMAT, read_grams
from jaxcrit.evidence.states import GivenModel, HiddenStates
from jaxcrit.evidence.states_files import OWN, write_states
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.model import Bars, Model
from jaxcrit.parallel.mesh import device_memory
from jaxcrit.similarity import (
    KEPT_SAMPLES,
    FeatureSums,
    Form,
    PackedGrams,
    Tables,
    centred_grams,
    choose_form,
    features,
    gram_tables,
    pack_upper,
    product_sharding,
    sampled_bandwidths,
    shard,
    sharded,
    tiled,
    unit_rows,
)

T = TypeVar("T")
# A fingerprint up to so large is kept unasked; a larger one outgrows what one wants in a run directory.
FINGERPRINT_BYTES = 10_000_000
# Datasets share batches up to so many times the tokens that a compile takes as long as: what an interruption may cost.
_TOGETHER = 1024


class Swept(NamedTuple):
    """Tables of one dataset, and the centred Grams they are from where these are whole."""

    tables: Tables
    grams: PackedGrams | jax.Array | None


class Captures:
    """The sweep of each dataset: from the run's fingerprint where one fits, else of its states, given or captured.

    The weights are read when the first dataset needs them. The shapes of batches are common to all datasets, so that
    each compiles once, and datasets that are small together share the batches too: less is left over to be filled up.
    """

    def __init__(
        self,
        config: AnalyzeOptions,
        model: Model | GivenModel,
        datasets: Sequence[Dataset | HiddenStates],
        directory: RunDirectory | None,
        progress: Bars | None,
    ):
        self.config, self.model, self.directory, self.progress = config, model, directory, progress
        self.alone = len(datasets) == 1
        self.decoder: Decoder | None = None
        self.taken: dict[str, dict[str, Any]] = {}
        self.forms: dict[str, dict[str, Any]] = {}
        self.began = time.time()
        rows = [dataset for dataset in datasets if isinstance(dataset, Dataset)]
        self.groups: list[list[Dataset]] = []
        self.held: dict[str, tuple[HiddenStates, jax.Array | None]] = {}
        if isinstance(model, Model):
            self.budget = model.budget(config.batch_size)
            parts = [dataset.examples for dataset in rows]
            self.shapes = common_shapes(parts, self.budget, max_length=model.config.max_length)
            self.groups = self._grouped(rows)

    def folder(self, dataset: Dataset | HiddenStates) -> Path | None:
        """Where a dataset's files go; None where nothing is kept."""
        if self.directory is None:
            return None
        return self.directory.path if self.alone else self.directory.path / dataset.name

    def sweep(self, dataset: Dataset | HiddenStates, *, grams: bool = False) -> Swept:
        """The sweep of a dataset; what it takes to redo the statistics is kept in the run directory.

        Args:
            dataset: rows, or states of them.
            grams: whether whole Grams are wanted.
        """
        folder = self.folder(dataset)
        form = self._form(dataset, grams)
        self.forms[dataset.name] = {**dataclasses.asdict(form), "text": str(form)}
        if (kept := self._kept(folder)) is not None:
            self.taken[dataset.name] = {"reused": True}
            return Swept(gram_tables(kept, band=form.band), kept)
        size, few = self._fingerprint_bytes(dataset), self._samples(dataset)[0] <= KEPT_SAMPLES
        unkept = size > FINGERPRINT_BYTES and few and not self.config.fingerprint
        if self.directory is not None and self.directory.resumed and unkept:
            console.note(
                f"{dataset.name}: swept again, for its Grams ({size / 1e6:.0f} MB) were not kept; a run with"
                " --fingerprint keeps them"
            )
        if form.name == "streamed" and isinstance(dataset, Dataset):
            return Swept(self._streamed(dataset, form), None)
        states, embed = self.states(dataset)
        if folder is not None:
            processes.make_directory(folder)
        swept = self._swept(states, form, folder)
        if folder is not None and self.config.save_activations:
            write_states(folder / OWN, states, embed)
        return swept

    def states(self, dataset: Dataset | HiddenStates) -> tuple[HiddenStates, jax.Array | None]:
        """Given states on the mesh, else captured ones; and of these the embedding output where it is asked for."""
        if isinstance(dataset, HiddenStates):
            self.taken[dataset.name] = {"given": True}
            everywhere = NamedSharding(self.model.mesh, PartitionSpec())
            return dataclasses.replace(dataset, hidden=jax.device_put(dataset.hidden, everywhere)), None
        if dataset.name not in self.held:
            self._capture(next(group for group in self.groups if dataset in group), dataset)
        return self.held.pop(dataset.name)

    def _capture(self, group: Sequence[Dataset], first: Dataset) -> None:
        """Captures the states of a group's datasets, without those that are kept from an earlier launch."""
        assert isinstance(self.model, Model)
        resumed = self.directory is not None and self.directory.resumed
        wanted = [one for one in group if one is first or not (resumed and self._kept(self.folder(one)) is not None)]
        found = self._run(group, wanted, partial(capture, with_embed=self.config.embed))
        ends = np.cumsum([0, *(len(one.examples) for one in group)])
        for start, stop, dataset in zip(ends, ends[1:], group, strict=False):
            if dataset not in wanted:
                continue
            inside = slice(*np.searchsorted(found.units, [start, stop]))
            units, whole = found.units[inside] - start, len(group) == 1  # which is not copied
            meta = {
                **self.model.facts,
                "dataset": dataset.name,
                "template_hash": template_hash(self.model.tokenizer, self.config.template, self.config.edition),
                "position": self.config.position,
            }
            states = HiddenStates(
                found.hidden if whole else found.hidden[:, inside],
                np.array(dataset.sample_ids)[units].tolist(),
                units if self.config.position == "all" else None,
                meta,
                dataset.name,
                dataset.source,
                self.model.dtype or "the checkpoint's dtype",
            )
            self.held[dataset.name] = states, None if found.embed is None else found.embed[inside]

    def _grouped(self, datasets: Sequence[Dataset]) -> list[list[Dataset]]:
        """Datasets that share batches, in the order given: as many as fit in a part of the memory and of the time."""
        if len(datasets) == 1:
            return [[*datasets]]
        sizes, groups = self.model.config, list[list[Dataset]]()
        room, most = device_memory(self.model.mesh.local_devices) / 4, _TOGETHER * self.budget.shape
        tokens = held = np.inf
        for dataset in datasets:
            more, alone = (
                sum(one.prompt_length for one in dataset.examples),
                self._form(dataset, False).name == "streamed",
            )
            states = 4 * sizes.num_layers * sizes.width * self._samples(dataset)[0]
            if alone or tokens + more > most or held + states > room:
                groups.append([])
                tokens = held = 0
            groups[-1].append(dataset)
            tokens, held = (np.inf, np.inf) if alone else (tokens + more, held + states)
        return groups

    def _kept(self, folder: Path | None) -> PackedGrams | None:
        """Grams that an earlier launch of this run has kept; None where there are none."""
        directory, earlier = self.directory, []
        if directory is None or folder is None:
            return None

        def look() -> bool:
            kept = not self.config.save_activations or (folder / OWN).exists()
            file = folder / "fingerprint.npz"
            if directory.resumed and file.exists() and kept:
                arrays, meta = read_grams(file)
                if meta.get("identity") == directory.identity:
                    earlier.append(arrays["gram"])
            return bool(earlier)

        if not processes.share(look):
            return None
        return PackedGrams(processes.share_array(earlier[0] if earlier else None))

    def grams(self, dataset: Dataset | HiddenStates) -> PackedGrams | jax.Array:
        """The centred Grams, for what takes them whole.

        Raises:
            UserError: there are too many samples to keep them.
        """
        found = self.sweep(dataset, grams=True).grams
        if found is None:
            raise UserError(f"{dataset.name}: too many samples to keep their Grams; give fewer prompts with --limit")
        return found

    def _samples(self, dataset: Dataset | HiddenStates) -> tuple[int, bool]:
        """N, and whether samples are tokens, of which several come from one prompt."""
        if isinstance(dataset, HiddenStates):
            return dataset.num_samples, dataset.units is not None
        prompts, tokens = dataset.examples, self.config.position == "all"
        return sum(one.prompt_length for one in prompts) if tokens else len(prompts), tokens

    def _fingerprint_bytes(self, dataset: Dataset | HiddenStates) -> int:
        count = self._samples(dataset)[0]
        return 2 * self.model.config.num_layers * count * (count + 1)

    def _form(self, dataset: Dataset | HiddenStates, grams: bool) -> Form:
        config, sizes = self.config, self.model.config
        count, tokens = self._samples(dataset)
        if config.fingerprint and count > KEPT_SAMPLES:
            raise UserError(
                f"--fingerprint: {dataset.name} has {count} samples, expected at most {KEPT_SAMPLES}; give fewer with"
                " --limit, or leave it out"
            )
        try:
            return choose_form(
                count,
                sizes.width,
                sizes.num_layers,
                band=config.layer_band,
                kernel=config.kernel,
                memory=device_memory(self.model.mesh.local_devices),
                devices=self.model.mesh.size,
                stored=config.save_activations or isinstance(dataset, HiddenStates),
                # Errors over prompts of several tokens delete many rows of a Gram at once.
                grams=grams or tokens or bool(config.measures) or config.fingerprint,
                asked=config.form,
            )
        except UserError as error:
            raise UserError(f"{dataset.name}: {error}") from None

    def _swept(self, states: HiddenStates, form: Form, folder: Path | None) -> Swept:
        """The sweep of stored states; of the resident form with a fingerprint."""
        config, hidden, repeats = self.config, self._normalised(states.hidden), states.units is not None
        if form.name == "resident":
            whole = centred_grams(hidden, config.kernel, allow_repeats=repeats)
            if folder is None or not (config.fingerprint or self._fingerprint_bytes(states) <= FINGERPRINT_BYTES):
                return Swept(gram_tables(whole, band=form.band), whole)
            packed = pack_upper(whole)
            del whole
            grams = self._fingerprint(states, packed, folder / "fingerprint.npz")
            return Swept(gram_tables(grams, band=form.band), grams)
        with self._bar(f"{states.name}, sweep") as progress:
            if form.name == "features":
                tables: Tables = features(
                    hidden,
                    band=form.band,
                    sharding=self._product_sharding(),
                    allow_repeats=repeats,
                    progress=progress,
                )
                return Swept(tables, None)
            bandwidths = None
            if config.kernel == "rbf":
                bandwidths = sampled_bandwidths(hidden, seed=config.seed)
                self.forms[states.name] |= {"bandwidths": bandwidths.tolist(), "bandwidth_seed": config.seed}
            mesh = self.model.mesh
            tile: Callable[..., Tables] = partial(
                tiled, jax.device_put(processes.whole(hidden), mesh.local_devices[0]), progress=progress
            )
            if mesh.size > 1 and hidden.shape[1] % mesh.size == 0:
                tile = partial(sharded, shard(hidden, mesh))
            swept = tile(kernel=config.kernel, band=form.band, bandwidths=bandwidths, allow_repeats=repeats)
            return Swept(swept, None)

    def _streamed(self, dataset: Dataset, form: Form) -> Tables:
        """Sums added up batch by batch, without activations ever being stored."""
        if self.config.position != "all":
            refuse_equal_prompts(dataset.examples)
        sizes = self.model.config
        sums = FeatureSums(sizes.num_layers, sizes.width, band=form.band, sharding=self._product_sharding())

        def add(*arguments: Any, **options: Any) -> None:
            for states in stream(*arguments, **options):
                sums.add(self._normalised(states.hidden, states.samples), states.samples)

        self._run([dataset], [dataset], add)
        return sums.tables()

    def _normalised(self, hidden: Any, samples: np.ndarray | None = None) -> jax.Array:
        return unit_rows(hidden, samples) if self.config.normalize == "row" else hidden

    def _product_sharding(self) -> NamedSharding | None:
        mesh, width = self.model.mesh, self.model.config.width
        return product_sharding(mesh, width) if mesh.size > 1 and width % mesh.size == 0 else None

    def _fingerprint(self, states: HiddenStates, packed: np.ndarray, file: Path) -> PackedGrams:
        assert self.directory is not None
        meta = {
            "format": FINGERPRINT_FORMAT,
            "format_version": 1,
            "identity": self.directory.identity,
            "model_hash": self.model.model_hash,
            "template_hash": states.meta.get("template_hash", "given states"),
            "position": states.position,
            "kernel": self.config.kernel,
            "normalize": self.config.normalize,
            "num_layers": self.model.config.num_layers,
        }
        units = np.arange(states.num_samples) if states.units is None else states.units
        write_npz(file, {"gram": packed, "sample_ids": np.array(states.sample_ids), "units": units}, meta)
        return PackedGrams(packed)  # so that a resumed run computes from the same bits

    def _run(self, group: Sequence[Dataset], wanted: Sequence[Dataset], take: Callable[..., T]) -> T:
        """Gives the model and the batches of a group that hold what is wanted to ``take``; notes what that took.

        A prompt's number is its place among all prompts of the group.
        """
        assert isinstance(self.model, Model)
        if self.decoder is None:
            self.decoder = self.model.decoder(self.progress)
        examples = [example for one in group for example in one.examples]
        needed = np.repeat([one in wanted for one in group], [len(one.examples) for one in group])
        batches = [
            batch
            for batch in make_batches(examples, self.budget, self.shapes, max_length=self.model.config.max_length)
            if needed[batch.rows[batch.rows < len(examples)]].any()
        ]
        began, count = time.perf_counter(), len(examples)
        names = [one.name for one in group]
        with self._bar(names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more") as progress:
            taken = take(
                self.decoder,
                batches,
                count,
                mesh=self.model.mesh,
                position=self.config.position,
                precision=self.config.precision,
                progress=progress,
            )
        seconds = time.perf_counter() - began
        noted = {
            "together": names,
            "seconds": round(seconds, 3),
            "prompts_per_second": round(count / seconds, 2),
            "tokens": sum(example.prompt_length for example in examples),
            "padded_tokens": sum(batch.tokens.size for batch in batches),
            "shapes": len({batch.tokens.shape for batch in batches}),
        }
        self.taken |= dict.fromkeys((one.name for one in wanted), noted)
        return taken

    @contextlib.contextmanager
    def _bar(self, name: str) -> Iterator[Callable[[int, int], None] | None]:
        """A progress bar that learns how much there is to do with the first step."""
        if self.progress is None:
            yield None
            return
        with self.progress(total=None, desc=name) as bar:

            def advance(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield advance

    def times(self) -> dict[str, Any]:
        return {
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.began)),
            "seconds": round(time.time() - self.began, 3),
            "compiled_forward_passes": compiled_steps(),
            "capture": self.taken,
        }
