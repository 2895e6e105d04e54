"""The names that options of the process may have, and what samplers do by default; without torch.

`samplers.MAKERS` and the tables of schedule.py and objective.py have a function for each of them.
"""

from typing import NamedTuple


class SamplerInfo(NamedTuple):
    """Describe a sampler: what it is called elsewhere, and what it does by default.

    title: the name that other programs write into their pictures.
    etas: what eta may be set to, from and to. extra: see `schedule.timesteps`.
    """

    title: str
    eta: float = 0.0
    etas: tuple[float, float] = (0, 0)
    spacing: str = "trailing"
    extra: int = 0


SAMPLERS = {
    "ddpm": SamplerInfo("DDPM", 1.0, (1, 1)),
    "ddpm_large": SamplerInfo("DDPM large", 1.0, (1, 1)),
    "ddim": SamplerInfo("DDIM", 0.0, (0, 1)),
    "dpmpp_2m": SamplerInfo("DPM++ 2M", extra=1),
    "dpmpp_2m_sde": SamplerInfo("DPM++ 2M SDE", 1.0, (0, 1), "flow", 1),
    "dpmpp_3m": SamplerInfo("DPM++ 3M", spacing="flow", extra=1),
    "dpmpp_3m_sde": SamplerInfo("DPM++ 3M SDE", 1.0, (0, 1), "flow", 1),
    "adams4": SamplerInfo("Adams 4", spacing="flow"),
    "deis": SamplerInfo("DEIS", spacing="flow"),
    "unipc2": SamplerInfo("UniPC", spacing="flow"),
    "unipc3": SamplerInfo("UniPC 3", spacing="flow"),
    "ipndm": SamplerInfo("IPNDM", spacing="flow"),
    "heun": SamplerInfo("Heun", spacing="karras"),
    "dpm2": SamplerInfo("DPM2", spacing="karras"),
    "lcm": SamplerInfo("LCM", 1.0, (1, 1), "consistency"),
}
DEFAULT_SAMPLER = "dpmpp_2m_sde"  # the best of docs/solvers.md
DEFAULT_STEPS = 20
PROMPT_SCALE = 7.5  # of guidance, where a prompt leads and no scale is given
ALIASES = {"euler": "ddim", "euler_a": "ddpm"}  # the same tables by their other names
TITLES = {"euler": "Euler", "euler_a": "Euler a"}
SPACINGS = ("leading", "trailing", "linspace", "logsnr", "karras", "flow", "consistency")
PATHS = ("vp", "edm", "flow")
SCHEDULES = ("cosine", "linear", "sigmoid", "scaled_linear")
NOISE_DISTS = ("uniform", "lognormal", "logit_normal")
OBJECTIVES = ("eps", "x0", "v", "flow", "edm")
LOSSES = ("l1", "l2", "huber")
