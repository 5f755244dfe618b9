"""The machine that interprets pickles: pickle itself is the judge, where it may be run."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import pickle
import pickletools
import struct
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zoo.containers.errors import CorruptInput, ZooError
from zoo.containers.torch_file import machine as pickle_machine
from zoo.containers.torch_file.builders import Placeholder


def assert_two_lines(error: ZooError) -> None:
    assert len(str(error).splitlines()) == 2


def run(raw: bytes) -> Any:
    return pickle_machine.load(io.BytesIO(raw), "it")


keys = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(), st.binary(), st.floats(allow_nan=False)
)
leaves = st.one_of(keys, st.complex_numbers(), st.builds(bytearray, st.binary()))
values = st.recursive(
    leaves,
    lambda x: st.one_of(
        st.lists(x),
        st.lists(x).map(tuple),
        st.dictionaries(st.one_of(keys, st.tuples(keys, keys)), x),
        st.sets(keys),
        st.frozensets(keys),
    ),
    max_leaves=10,
)


@settings(max_examples=80, deadline=None)
@given(values, st.integers(0, 5))
def test_plain_data_is_what_pickle_makes_of_it(value: Any, protocol: int) -> None:
    assert repr(run(pickle.dumps(value, protocol))) == repr(
        pickle.loads(pickle.dumps(value, protocol))
    )


def test_every_opcode_is_known_or_refused() -> None:
    known = set(pickle_machine._OPS) | pickle_machine._PUSHED | {"STOP"}
    refused = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER", "PERSID"}
    assert {op.name for op in pickletools.opcodes} == known | refused
    assert not known & refused
    for raw in (b"\x82\x01.", b"\x83\x01\x01.", b"\x97.", b"\x80\x05\x98.", b"Pabc\n."):
        with pytest.raises(CorruptInput, match="it uses the opcode"):
            run(raw)


def test_shared_and_self_referential_objects_stay_shared() -> None:
    loop: list[Any] = []
    loop += [loop, {"me": loop}]
    made = run(pickle.dumps(loop))
    assert made[0] is made
    assert made[1]["me"] is made
    a, b = run(pickle.dumps([s := {1}, s]))
    assert a is b


def test_placeholders_hold_what_they_would_have_been_built_from() -> None:
    made = run(pickle.dumps(argparse.Namespace(a=[1])))
    assert isinstance(made, Placeholder)
    assert made.state == {"a": [1]}
    day = run(pickle.dumps(datetime.date(2020, 1, 1)))
    assert (day.kind, day.args) == ("datetime.date", (b"\x07\xe4\x01\x01",))


MALFORMED = {
    "nothing": b"",
    "no stop": b"\x80\x02N",
    "underflow": b".",
    "underflow in a tuple": b"N\x86.",
    "no mark": b"Nt.",
    "an unset memo": b"h\x05.",
    "put of nothing": b"q\x00.",
    "append to none": b"NNa.",
    "item of a list": b"]NNs.",
    "odd items": b"}(Nu.",
    "key a list": b"}]Ns.",
    "key with a list": b"}]\x85Ns.",
    "reduce of a number": b"K\x01)R.",
    "arguments no tuple": b"cx\ny\nNR.",
    "global of numbers": b"K\x01K\x02\x93.",
    "obj of nothing": b"(o.",
    "build of a number": b"K\x01Nb.",
    "protocol 6": b"\x80\x06N.",
    "unknown opcode": b"\xff.",
    "huge string": b"\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
    "huge bytes": b"B\xff\xff\xff\xffx.",
    "negative length": b"T\xff\xff\xff\xffx.",
    "huge decimal": b"L" + b"9" * 9000 + b"L\n.",
    "bad number": b"Ixyz\n.",
    "bad float": b"Fxyz\n.",
    "bad text": b"X\x01\x00\x00\x00\xff.",
    "no newline": b"cos",
    "bad escape": b"c\\q\\d\n",
    "persistent id of nothing": b"NQ.",
    "storage of os": b"(X\x07\0\0\0storagecos\nsystem\nX\x01\0\0\0aX\x01\0\0\0bK\x01tQ.",
    "ordered dict of numbers": b"ccollections\nOrderedDict\n]K\x01a\x85R.",
    "endless complex": b"cbuiltins\ncomplex\nG" + b"\x7f" * 8 + b"K\x00\x86R0" + b"\x8a\xff",
    "dtype state": b"cnumpy\ndtype\nX\x02\0\0\0f4\x85RNb.",
    "array without bytes": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\ntR(K\x01K\x02"
    b"\x85cnumpy\ndtype\nX\x02\0\0\0f4\x85RNX\x01\0\0\0atb.",
    "deep marks": b"(" * 5000 + b".",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_pickles(case: str) -> None:
    with pytest.raises(CorruptInput, match="it: the pickle in it is malformed: ") as e:
        run(MALFORMED[case])
    assert e.value.problem.isprintable()
    assert len(str(e.value).splitlines()) == 2


def pickle_of(obj: Any, protocol: int) -> bytes:
    """The pickle in what torch.save makes of `obj`."""
    torch.save(obj, file := io.BytesIO(), pickle_protocol=protocol)
    with zipfile.ZipFile(file) as z:
        return z.read("archive/data.pkl")


def corpus() -> list[bytes]:
    ordered = collections.OrderedDict(a=1)
    objects = [
        {"w": torch.ones(2), "p": nn.Parameter(torch.ones(1)), "o": ordered, "n": np.arange(3)},
        argparse.Namespace(x={1}),
        [np.float32(1), torch.float32, torch.Size([1]), torch.ones(1, dtype=torch.uint16)],
    ]
    return [pickle_of(obj, protocol) for obj in objects for protocol in (1, 2, 4, 5)]


CORPUS = corpus()


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(CORPUS), st.data())
def test_mutated_pickles_are_read_or_refused(raw: bytes, data: st.DataObject) -> None:
    mutated = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        match data.draw(st.integers(0, 2)):
            case 0:
                mutated[at] = data.draw(st.integers(0, 255))
            case 1:
                del mutated[at : at + data.draw(st.integers(1, 8))]
            case 2:
                mutated[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        mutated = mutated or bytearray(b".")
    try:
        run(bytes(mutated))
    except ZooError as e:
        assert_two_lines(e)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([op.code.encode("latin-1") for op in pickletools.opcodes])))
def test_any_opcodes_are_read_or_refused(codes: list[bytes]) -> None:
    try:
        run(b"(((]}NK\x01q\x00" + b"".join(codes) + b".")
    except ZooError as e:
        assert_two_lines(e)
