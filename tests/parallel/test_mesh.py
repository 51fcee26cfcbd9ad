"""The mesh and the placement of tensors on it."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcrit.core.errors import UserError
from jaxcrit.parallel.mesh import batch_sharding, make_mesh, parse_mesh, spec_for


class TestParse:
    def test_reads(self):
        assert parse_mesh(None) == parse_mesh("") == parse_mesh(" ") == {}
        assert parse_mesh("data=4, fsdp=2") == {"data": 4, "fsdp": 2}
        assert parse_mesh("tensor=-1") == {"tensor": -1}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("data", "AXIS=SIZE such as data=4,fsdp=2, got 'data'"),
            ("data=", "got 'data='"),
            ("data=2,", "got ''"),
            ("data=two", "got 'data=two'"),
            ("data=2.0", "got 'data=2.0'"),
            ("data=--1", "got 'data=--1'"),
            ("=2", "expected axes data, fsdp, tensor, got ''"),
            ("fdsp=2", r"did you mean 'fsdp'\?"),
            ("data=2,data=4", "data twice"),
            ("data=0", "got data=0"),
            ("data=-2", "got data=-2"),
            ("data=-1,fsdp=-1", "at most one size of -1, got 2"),
        ],
    )
    def test_refuses(self, text, message):
        with pytest.raises(UserError, match=message):
            parse_mesh(text)


class TestMake:
    @pytest.mark.parametrize(
        ("text", "shape"),
        [
            ("", (8, 1, 1)),
            ("data=4,fsdp=2", (4, 2, 1)),
            ("tensor=2,data=-1", (4, 1, 2)),
            ("fsdp=-1", (1, 8, 1)),
            ("data=8,tensor=-1", (8, 1, 1)),
        ],
    )
    def test_axes(self, text, shape):
        mesh = make_mesh(parse_mesh(text))
        assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == shape
        assert mesh.axis_types == (AxisType.Auto,) * 3

    def test_given_devices(self):
        assert make_mesh(None, jax.devices()[:1]).devices.shape == (1, 1, 1)
        assert make_mesh({"fsdp": 2}, jax.devices()[:2]).devices.shape == (1, 2, 1)

    @pytest.mark.parametrize(
        ("axes", "message"),
        [
            ({"fsdp": 2}, "--mesh=fsdp=2: expected sizes whose product is 8, the number of devices, got 2"),
            ({"data": 16}, "got 16"),
            ({"data": -1, "tensor": 3}, "product is 8, the number of devices, got 3"),
            ({"data": -1, "tensor": 16}, "got 16"),
            ({"model": 8}, "expected axes data, fsdp, tensor, got 'model'"),
        ],
    )
    def test_refuses(self, axes, message):
        with pytest.raises(UserError, match=message):
            make_mesh(axes)


MESH = {"data": 2, "fsdp": 2, "tensor": 2}


class TestSpec:
    @pytest.mark.parametrize(
        ("axes", "shape", "spec"),
        [
            (("vocab", "embed"), (320, 64), P("tensor", "fsdp")),
            (("layers", "heads", "head_dim", "embed"), (3, 4, 5, 64), P(None, "tensor", None, "fsdp")),
            (("layers", "kv_heads", "head_dim", "embed"), (3, 2, 5, 64), P(None, "tensor", None, "fsdp")),
            (("layers", "kv_heads", "head_dim", "embed"), (3, 1, 5, 64), P(None, None, None, "fsdp")),
            (("embed", "ff"), (64, 96), P("fsdp", "tensor")),
            (("batch", None), (8, 7), P(("data", "fsdp"), None)),
        ],
    )
    def test_rules(self, axes, shape, spec):
        mesh = make_mesh(MESH)
        assert spec_for(axes, shape, mesh, "w") == spec
        placed = jax.device_put(np.zeros(shape, np.float32), NamedSharding(mesh, spec))
        assert placed.sharding.spec == spec

    def test_uneven(self):
        with pytest.raises(UserError, match=r"^head: vocab of size 321 does not divide over tensor=2 .* divides 321"):
            spec_for(("vocab", "embed"), (321, 64), make_mesh(MESH), "head")
        with pytest.raises(UserError, match=r"batch of size 6 does not divide over data\*fsdp=4 .* data and fsdp"):
            spec_for(("batch",), (6,), make_mesh(MESH), "tokens")
        assert spec_for(("vocab",), (321,), make_mesh(), "head") == P("tensor")

    def test_slips_of_our_own_name_the_tensor(self):
        mesh = make_mesh(MESH)
        with pytest.raises(ValueError, match=r"^w: .* two dimensions on mesh axis tensor"):
            spec_for(("heads", "ff"), (4, 4), mesh, "w")
        with pytest.raises(ValueError, match=r"^w: expected a logical axis of .*, got 'width'"):
            spec_for(("width",), (4,), mesh, "w")
        with pytest.raises(ValueError, match=r"^w: expected an axis for each dimension"):
            spec_for(("embed",), (4, 4), mesh, "w")

    def test_batch_sharding(self):
        placed = jax.device_put(np.zeros((8, 5)), batch_sharding(make_mesh(MESH)))
        assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 5)}
