"""Which variables of the submitting shell a job gets: those that make up its Python, and those that a person names.

Contract: `carried` is pure. A job is started with nothing of the submitting shell (`sbatch --export=NIL`), so what is
here is all that it has besides SLURM's own variables. Taken are what finds programs and libraries (PATH,
LD_LIBRARY_PATH, PYTHONPATH, virtual environments, conda, modules), who and where the user is, language and time zone,
and the settings of the libraries below. What says that this shell is itself a rank is left behind. A variable whose
name says that its value is a secret is taken only where it is named, and then through SLURM and not in the script.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from allstep.errors import ConfigurationError
from allstep.launch.settings import RESERVED
from allstep.protocol.masking import is_secret
from allstep.protocol.save_record import MEASURE, SAVES

NAMES = frozenset(
    {
        *("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ"),
        *("VIRTUAL_ENV", "MODULEPATH", "MODULESHOME", "LOADEDMODULES", "_LMFILES_", "CUDA_HOME", "CUDA_PATH"),
        *("CUDA_DEVICE_ORDER", "SLURM_CONF", "XDG_CACHE_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR", "NO_COLOR"),
        *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
    }
)
PREFIXES = (
    *("LC_", "CONDA_", "LMOD_", "__LMOD_", "PYTHON", "OMP_", "MKL_", "OPENBLAS_", "NCCL_", "GLOO_", "UCX_", "FI_"),
    *("TORCH_", "PYTORCH_", "CUBLAS_", "HF_", "TRANSFORMERS_", "TRITON_", "WANDB_", "MLFLOW_", "ALLSTEP_"),
)
"""What the names begin with that are taken too."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Of one run, and not settings for another.
_OF_A_RUN = frozenset(
    {SAVES, MEASURE, "ALLSTEP_ARRAY_MEMBER", "ALLSTEP_STATUS_LINE", "ALLSTEP_LAUNCH", "ALLSTEP_DEBUG_RANK"}
)


@dataclass(frozen=True, slots=True)
class CarriedEnvironment:
    """What a job gets of the shell that submits it.

    Args:
        exports: names and values that stand in the batch script.
        through_slurm: names whose values SLURM carries.
        left: names that were there and are not taken.
    """

    exports: Mapping[str, str]
    through_slurm: tuple[str, ...]
    left: tuple[str, ...]


def carried(environ: Mapping[str, str], asked: tuple[str, ...] = ()) -> CarriedEnvironment:
    """Choose from the variables of a shell.

    Args:
        environ: all of them.
        asked: names to take too, and NAME=VALUE to set.

    Raises:
        ConfigurationError: a name is asked for that is not there, or is one that the launcher sets.
    """
    exports = {name: environ[name] for name in sorted(environ) if _is_taken(name)}
    through_slurm = []
    for each in asked:
        name, equals, value = each.partition("=")
        if name in RESERVED and name not in ("MASTER_ADDR", "MASTER_PORT"):
            raise ConfigurationError(f"env has {name}, which is set for each worker by itself; leave it out")
        if not equals:
            if name not in environ:
                raise ConfigurationError(f"env has {name}, which is not set here; export it, or say {name}=VALUE")
            value = environ[name]
        if is_secret(name) and not equals:
            through_slurm.append(name)
        else:
            exports[name] = value
    left = tuple(sorted(name for name in environ if name not in exports and name not in through_slurm))
    return CarriedEnvironment(exports, tuple(through_slurm), left)


def _is_taken(name: str) -> bool:
    if is_secret(name) or name in RESERVED or name in _OF_A_RUN or not _NAME.fullmatch(name):
        return False
    return name in NAMES or name.startswith(PREFIXES)
