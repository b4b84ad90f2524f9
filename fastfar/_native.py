"""The native CPU library, by ctypes: find it, check that it is ours, call it.

The interface is `kernels/cpu/fastfar_cpu.h`. Tensors cross as pointers and sizes; ctypes releases
the interpreter lock during each call. Nothing here reads an environment variable: `backend.py`
selects the instruction set.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch
from torch import Tensor

ABI_VERSION = 2
FOLDER = Path(__file__).resolve().parent / "lib"
NOT_BUILT = (
    "the native library was not built (no C++ compiler or no CMake at installation); "
    "install a C++17 compiler and CMake, then reinstall fastfar with FASTFAR_REQUIRE_NATIVE=1"
)

_INT = ctypes.c_int32
_SIZE = ctypes.c_int64
_REAL = ctypes.c_float
_POINTER = ctypes.c_void_p

# Numbers in memory, numbered as in the header.
DTYPES = {torch.float32: 0, torch.bfloat16: 1}

# Functions that are no operations.
_SIGNATURES: dict[str, tuple[type, tuple[type, ...]]] = {
    "fastfar_abi_version": (_INT, ()),
    "fastfar_isa_count": (_INT, ()),
    "fastfar_isa_name": (ctypes.c_char_p, (_INT,)),
    "fastfar_isa_reason": (ctypes.c_char_p, (_INT,)),
    "fastfar_isa_best": (_INT, ()),
    "fastfar_isa_selected": (_INT, ()),
    "fastfar_isa_select": (_INT, (_INT,)),
    "fastfar_packed_bytes": (_SIZE, (_INT, _SIZE, _SIZE)),
}

# Operations: the fields of fastfar_<op>_args in order. After the colon: i int32, q int64, f float,
# p pointer. A test holds this table to the header.
_OPERATIONS: dict[str, str] = {
    "adaln_mlp_block": (
        "dtype:i x_dtype:i modulation_dtype:i threads:i rows:q width:q modulation_stride:q eps:f "
        "x_NW:p shift_NW:p scale_NW:p gate_NW:p norm_weight:p norm_bias:p fc1:p fc1_bias:p fc2:p "
        "fc2_bias:p h_NW:p u_NW:p out_NW:p scratch:p"
    ),
    "adaln_mlp_block_backward": (
        "dtype:i x_dtype:i modulation_dtype:i threads:i rows:q width:q modulation_stride:q eps:f "
        "x_NW:p shift_NW:p scale_NW:p gate_NW:p norm_weight:p norm_bias:p fc1_transposed:p "
        "fc2_transposed:p h_NW:p u_NW:p dout_NW:p dx_NW:p dshift_NW:p dscale_NW:p dgate_NW:p "
        "dnorm_weight:p dnorm_bias:p dfc1_weight:p dfc1_bias:p dfc2_weight:p dfc2_bias:p scratch:p"
    ),
    "attention": (
        "dtype:i threads:i batch:q length:q heads:q width:q qkv_BS3HE:p key_mask_BS:p out_BSD:p "
        "scratch:p"
    ),
    "denoise_loop": (
        "dtype:i threads:i rows:q halves:q width:q depth:q channels:q condition_width:q steps:q "
        "rows_per_task:q steps_ahead:q weights:p vectors:p condition_MD:p time_TW:p table:p "
        "initial_NP:p noise_TNP:p level:f guidance_scale:f x0_low:f x0_high:f out_NP:p scratch:p"
    ),
    "filter_mask_patchify": (
        "dtype:i threads:i batch:q channels:q size:q patch:q levels:q stride:q matrices:p "
        "transposed:p level_B:p mask_BL:p latent_BCHW:p tokens_BLP:p scratch:p"
    ),
    "filter_mask_patchify_backward": (
        "dtype:i threads:i batch:q channels:q size:q patch:q levels:q stride:q matrices:p "
        "transposed:p level_B:p mask_BL:p tokens_BLP:p latent_BCHW:p scratch:p"
    ),
    "groupnorm_silu": (
        "dtype:i silu:i threads:i eps:f batch:q positions:q channels:q groups:q x_BSC:p weight_C:p "
        "bias_C:p y_BSC:p scratch:p"
    ),
    "hybrid_loss": (
        "dtype:i threads:i rows:q numbers:q num_timesteps:q output_N2P:p target_NP:p noise_NP:p "
        "noised_NP:p timestep_N:p table_T6:p loss_N:p"
    ),
    "hybrid_loss_backward": (
        "dtype:i threads:i rows:q numbers:q num_timesteps:q output_N2P:p target_NP:p noise_NP:p "
        "noised_NP:p timestep_N:p table_T6:p dloss_N:p doutput_N2P:p"
    ),
    "layernorm_attention_residual": (
        "dtype:i x_dtype:i threads:i batch:q length:q heads:q width:q eps:f x_BSD:p norm_weight:p "
        "norm_bias:p qkv:p qkv_bias:p proj:p proj_bias:p key_mask_BS:p out_BSD:p scratch:p"
    ),
    "layernorm_linear": (
        "dtype:i x_dtype:i threads:i rows:q n:q k:q eps:f x_MK:p norm_weight:p norm_bias:p "
        "weight:p bias:p out_MN:p scratch:p"
    ),
    "layernorm_mlp_residual": (
        "dtype:i x_dtype:i threads:i rows:q width:q hidden:q eps:f x_MD:p norm_weight:p "
        "norm_bias:p fc1:p fc1_bias:p fc2:p fc2_bias:p out_MD:p scratch:p"
    ),
    "layernorm_mlp_residual_backward": (
        "dtype:i x_dtype:i threads:i rows:q width:q hidden:q eps:f x_MD:p norm_weight:p "
        "norm_bias:p fc1:p fc1_bias:p fc1_transposed:p fc2_transposed:p dout_MD:p dx_MD:p "
        "dnorm_weight:p dnorm_bias:p dfc1_weight:p dfc1_bias:p dfc2_weight:p dfc2_bias:p scratch:p"
    ),
    "linear": (
        "dtype:i x_dtype:i out_dtype:i threads:i rows:q n:q k:q x_stride:q x_MK:p weight:p bias:p "
        "out_MN:p scratch:p"
    ),
    "linear_backward": (
        "dtype:i x_dtype:i out_dtype:i threads:i rows:q n:q k:q x_stride:q x_MK:p "
        "weight_transposed:p dout_MN:p dx_MK:p dweight:p dbias:p scratch:p"
    ),
    "pack": "dtype:i source_dtype:i n:q k:q stride_n:q stride_k:q w:p packed:p threads:i",
    "peak": "dtype:i threads:i iterations:q numbers:q buffer:p results:p work:p",
    "selftest": (
        "dtype:i threads:i segments:i pieces:i m:q n:q k:q a_MK:p b_NK:p c_MN:p scratch:p"
    ),
}
_KINDS: dict[str, type] = {"i": _INT, "q": _SIZE, "f": _REAL, "p": _POINTER}


# Operations that tell how much scratch they need, by fastfar_<op>_scratch.
_WITH_SCRATCH = {
    "adaln_mlp_block",
    "adaln_mlp_block_backward",
    "attention",
    "denoise_loop",
    "filter_mask_patchify",
    "filter_mask_patchify_backward",
    "groupnorm_silu",
    "layernorm_attention_residual",
    "layernorm_linear",
    "layernorm_mlp_residual",
    "layernorm_mlp_residual_backward",
    "linear",
    "linear_backward",
    "selftest",
}


def _structure(op: str) -> type[ctypes.Structure]:
    fields = [tuple(field.split(":")) for field in _OPERATIONS[op].split()]
    return type(
        f"fastfar_{op}_args",
        (ctypes.Structure,),
        {"_fields_": [(name, _KINDS[kind]) for name, kind in fields]},
    )


def library_path() -> Path:
    """Where the library lies if it was built (`libfastfar_cpu.dylib` on macOS)."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    return FOLDER / f"libfastfar_cpu.{suffix}"


class NativeLibrary:
    """The loaded library. Raises OSError when the file is missing, foreign or too old or new."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(NOT_BUILT)
        self.path = path
        self._c = ctypes.CDLL(str(path))
        self._structures: dict[str, type[ctypes.Structure]] = {}
        try:
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(self._c, name)
                function.restype = result
                function.argtypes = arguments
            for op in _OPERATIONS:
                structure = self._structures[op] = _structure(op)
                function = getattr(self._c, f"fastfar_{op}")
                function.restype = _INT
                function.argtypes = (ctypes.POINTER(structure),)
                if op in _WITH_SCRATCH:
                    function = getattr(self._c, f"fastfar_{op}_scratch")
                    function.restype = _SIZE
                    function.argtypes = (ctypes.POINTER(structure),)
        except AttributeError as error:
            raise OSError(f"{path} is of another fastfar ({error}); reinstall fastfar") from error
        version = self._c.fastfar_abi_version()
        if version != ABI_VERSION:
            raise OSError(
                f"{path} has interface version {version}, this fastfar needs {ABI_VERSION}; "
                "reinstall fastfar"
            )
        self._names: list[str] = [
            self._c.fastfar_isa_name(isa).decode() for isa in range(self._c.fastfar_isa_count())
        ]

    def instruction_sets(self) -> dict[str, str | None]:
        """Every instruction set, slowest first: None = usable here, else the reason it is not."""
        reasons = [self._c.fastfar_isa_reason(isa) for isa in range(len(self._names))]
        return {
            name: None if reason is None else reason.decode()
            for name, reason in zip(self._names, reasons, strict=True)
        }

    @property
    def selected(self) -> str:
        """The instruction set that operations run on."""
        isa: int = self._c.fastfar_isa_selected()
        return self._names[isa]

    def select(self, name: str) -> str:
        """Run all later operations of this process on `name`, or on the best set for "auto".

        Raises ValueError when this machine or this build cannot serve it.
        """
        sets = self.instruction_sets()
        if name == "auto":
            name = self._names[self._c.fastfar_isa_best()]
        if name not in sets:
            raise ValueError(f"unknown instruction set {name!r}; known: auto, {', '.join(sets)}")
        if sets[name] is not None:
            usable = ", ".join(each for each, reason in sets.items() if reason is None)
            raise ValueError(
                f"instruction set {name!r} cannot be used: {sets[name]}; usable: {usable}"
            )
        self._c.fastfar_isa_select(self._names.index(name))
        return name

    def call(self, op: str, **fields: Tensor | float | None) -> int:
        """Run operation `op` on the selected set; returns its status, which is not negative.

        fields: every field of fastfar_<op>_args by name. A tensor stands for the address of its
        first number, None for a null pointer. The caller answers for dtypes, layouts and sizes, and
        keeps the tensors alive.

        Raises RuntimeError when the library refuses the arguments.
        """
        arguments = self._arguments(op, fields)
        status: int = getattr(self._c, f"fastfar_{op}")(ctypes.byref(arguments))
        if status < 0:
            raise RuntimeError(f"fastfar_{op} refused its arguments (code {status}): {fields}")
        return status

    def scratch(self, op: str, **fields: Tensor | float | None) -> int:
        """Bytes of scratch per thread that `call` with these fields needs."""
        arguments = self._arguments(op, fields)
        size: int = getattr(self._c, f"fastfar_{op}_scratch")(ctypes.byref(arguments))
        return size

    def _arguments(self, op: str, fields: dict[str, Tensor | float | None]) -> ctypes.Structure:
        structure = self._structures[op]
        values = {
            name: value.data_ptr() if isinstance(value, Tensor) else value
            for name, value in fields.items()
        }
        names = [field[0] for field in structure._fields_]
        if list(values) != names:
            raise TypeError(f"fastfar_{op} takes {names} in this order, got {list(values)}")
        return structure(*values.values())

    def packed_bytes(self, dtype: torch.dtype, n: int, k: int) -> int:
        """Bytes of an (n, k) matrix of weights in tile order."""
        size: int = self._c.fastfar_packed_bytes(DTYPES[dtype], n, k)
        return size

    def selftest(
        self, a_MK: Tensor, b_KN: Tensor, dtype: torch.dtype = torch.bfloat16
    ) -> tuple[Tensor, str]:
        """a b through the product of all kernels, and the instruction set whose code ran.

        a_MK: (M, K) float32, b_KN: (K, N) float32, on the CPU; any strides. dtype: bfloat16 rounds
        both, float32 does not; sums are float32. Returns (M, N) float32. Raises ValueError or
        TypeError on other input.
        """
        if a_MK.dtype != torch.float32 or b_KN.dtype != torch.float32 or dtype not in DTYPES:
            raise TypeError(
                f"selftest needs float32, got {a_MK.dtype} and {b_KN.dtype}; "
                f"it computes in float32 or bfloat16, not {dtype}"
            )
        if a_MK.dim() != 2 or b_KN.dim() != 2 or a_MK.shape[1] != b_KN.shape[0]:
            raise ValueError(
                f"selftest needs (M, K) and (K, N), got {tuple(a_MK.shape)}, {tuple(b_KN.shape)}"
            )
        if a_MK.device.type != "cpu" or b_KN.device.type != "cpu":
            raise ValueError(f"selftest needs CPU tensors, got {a_MK.device} and {b_KN.device}")
        a_MK = a_MK.contiguous()
        (m, k), n = a_MK.shape, b_KN.shape[1]
        c_MN = torch.zeros(m, n)
        if m == 0 or n == 0 or k == 0:
            return c_MN, self.selected
        threads = torch.get_num_threads()
        b_NK = torch.empty(self.packed_bytes(dtype, n, k), dtype=torch.uint8)
        self.call(
            "pack",
            dtype=DTYPES[dtype],
            source_dtype=DTYPES[b_KN.dtype],
            n=n,
            k=k,
            stride_n=b_KN.stride(1),
            stride_k=b_KN.stride(0),
            w=b_KN,
            packed=b_NK,
            threads=threads,
        )
        fields: dict[str, Tensor | float | None] = {
            "dtype": DTYPES[dtype],
            "threads": threads,
            "segments": 2,
            "pieces": 2,
            "m": m,
            "n": n,
            "k": k,
            "a_MK": a_MK,
            "b_NK": b_NK,
            "c_MN": c_MN,
        }
        scratch = torch.empty(self.scratch("selftest", **fields, scratch=None), dtype=torch.uint8)
        status = self.call("selftest", **fields, scratch=scratch)
        return c_MN, self._names[status]


@functools.cache
def load() -> NativeLibrary:
    """The library, loaded once. Raises OSError with the reason when there is none to load."""
    return NativeLibrary(library_path())


def reason() -> str | None:
    """None when the library loads, else why not."""
    try:
        load()
    except OSError as error:
        return str(error)
    return None
