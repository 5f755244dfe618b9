"""The names that a checkpoint's pickle mentions, and what is known of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from zoo.containers import dtypes
from zoo.containers.errors import printable


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# torch's storage types: the dtype of their elements and its size. Those that this package does
# not carry are here too, because a file's other storages lie behind them.
STORAGES: dict[str, tuple[str, int]] = {
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16),
    "QInt8Storage": ("qint8", 1),
    "QUInt8Storage": ("quint8", 1),
    "QInt32Storage": ("qint32", 4),
    "QUInt4x2Storage": ("quint4x2", 1),
    "QUInt2x4Storage": ("quint2x4", 1),
    "UntypedStorage": ("uint8", 1),
    "_UntypedStorage": ("uint8", 1),
    "TypedStorage": ("uint8", 1),
}
_DTYPES = frozenset(dtypes.FROM_NAME) | _words(
    "complex32 qint8 quint8 qint32 quint4x2 quint2x4 bits8 bits16 bits1x8 bits2x4 "
    "bits4x2 float4_e2m1fn_x2 uint1 uint2 uint3 uint4 uint5 uint6 uint7 int1 int2 int3 int4 int5 "
    "int6 int7"
)

# Modules and functions that no checkpoint has any business calling; a module stands for all
# that is in it. The list only decides between "refused" and "dropped with a notice": nothing
# is ever called, so what is missing here is not a hole.
_BANNED = _words(
    """
    os posix nt ntpath posixpath subprocess _posixsubprocess commands popen2 sys shutil socket
    _socket ssl pty tty runpy importlib _frozen_importlib _frozen_importlib_external imp zipimport
    pkgutil ctypes _ctypes cffi mmap fcntl code codeop pickle _pickle cPickle
    marshal shelve dbm webbrowser antigravity asyncio multiprocessing concurrent threading _thread
    pdb bdb timeit doctest pydoc site venv ensurepip pip setuptools
    distutils _distutils_hack inspect gc atexit sqlite3 http urllib urllib2 urllib3 requests httpx
    aiohttp ftplib smtplib telnetlib poplib imaplib nntplib xmlrpc paramiko platform linecache
    types.FunctionType types.CodeType types.LambdaType types.MethodType functools.partial
    functools.partialmethod functools.reduce functools.singledispatch operator.attrgetter
    operator.methodcaller operator.call io.open io.open_code io.FileIO _io.open _io.open_code
    _io.FileIO codecs.open tempfile logging.config cloudpickle.load
    cloudpickle.loads cloudpickle.pickle dill.load dill.loads dill.load_session dill._dill.load
    dill._dill.loads joblib.load joblib.numpy_pickle pandas.read_pickle pandas.io pandas.eval
    torch.hub torch.load torch.save torch.jit torch.package torch.ops torch.classes torch.compile
    torch.serialization.load torch.serialization.save torch.storage._load_from_bytes
    torch.utils.cpp_extension torch.utils.model_zoo torch.utils.collect_env torch.utils.bottleneck
    torch.multiprocessing torch._inductor torch.distributed.rpc
    torch.distributed.run torch.distributed.launch torch.fx.graph_module torch.export
    torch.testing torch._export torch._C._jit_script_compile torch._utils_internal
    numpy.load numpy.save numpy.savez numpy.savez_compressed numpy.savetxt numpy.loadtxt
    numpy.genfromtxt numpy.fromfile numpy.fromregex numpy.memmap numpy.lib numpy.testing
    numpy.f2py numpy.distutils numpy.ctypeslib numpy.vectorize numpy.frompyfunc
    numpy.apply_along_axis numpy.apply_over_axes numpy.piecewise
    """
)
_PLAIN_BUILTINS = _words(
    "set frozenset list dict tuple complex bytearray bytes int float str unicode long bool slice "
    "range xrange object type NotImplementedType ellipsis"
)
_SPELLINGS = {"__builtin__": "builtins", "copy_reg": "copyreg", "exceptions": "builtins"}


def shown(text: str) -> str:
    """`text` from a file, printable and no longer than a line should be."""
    return printable(text if len(text) <= 200 else text[:200] + "...")


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A class or function that a pickle names. It is never looked up."""

    module: str
    name: str

    @classmethod
    def of(cls, module: str, name: str) -> Self:
        """In today's spelling, where Python 2 or NumPy 1 had another."""
        module = _SPELLINGS.get(module, module)
        if module == "numpy.core" or module.startswith("numpy.core."):
            module = "numpy._core" + module[len("numpy.core") :]
        return cls(module, name)

    @property
    def qualified(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def shown(self) -> str:
        return shown(self.qualified)

    @property
    def storage(self) -> str | None:
        """Its key in STORAGES, if it is one of torch's storage types."""
        ours = self.module in ("torch", "torch.cuda", "torch.storage") and self.name in STORAGES
        return self.name if ours else None

    @property
    def dtype(self) -> str | None:
        """torch's name of the dtype that this is, whether we carry it or not."""
        return self.name if self.module == "torch" and self.name in _DTYPES else None


# What a TorchScript archive's pickle calls to say of what type a list is.
SCRIPT_BUILDERS = _words(
    "build_intlist build_doublelist build_boollist build_tensorlist restore_type_tag"
)
SCRIPT = "__torch__"  # the classes of one: modules, as the archive's own code defines them


def is_banned(function: Global) -> bool:
    """Whether a checkpoint that calls `function` can only be an attack."""
    if function.module == "torch.jit._pickle" and function.name in SCRIPT_BUILDERS:
        return False
    if function.module == "builtins":
        return function.name not in _PLAIN_BUILTINS and not function.name.endswith(
            ("Error", "Exception", "Warning")
        )
    # A dotted name may reach a module through another: torch.serialization, "os.system".
    *through, _ = function.name.split(".")[:16]
    if any(part in _BANNED or part == "builtins" for part in through):
        return True
    parts = function.qualified.split(".")[:16]
    return any(".".join(parts[: i + 1]) in _BANNED for i in range(len(parts)))
