"""Where a value comes from, and why it is what it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cpm_cluster.launch.origins import set_by
from cpm_cluster.launch.plan import LaunchPlan, Setting
from cpm_cluster.launch.runtimes import SYMBOLIC_NODE, run_options
from cpm_cluster.planner.fit import Fit
from cpm_cluster.specs.fields import described
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.values import format_size

# Where the plan departs from what the CPM-9G manual tells people to type.
CORRECTIONS = {
    "manual.gpus": ("--gpus all", "takes the GPUs of other jobs on the node; the plan lists those of its step by UUID"),
    "manual.sh": ("--sh", "is no option of docker; the program is named after the image"),
    "manual.network": ("no --network host (rootless)", "ranks would advertise an address that no other node reaches"),
    "manual.ntasks": ("srun -n 8 -c 8", "starts eight of everything; one task with all CPUs starts the eight ranks"),
    "manual.detach": ("docker run -it -d … bash", "the container would outlive the job; the agent holds it"),
    "manual.tag": ("docker tag [IMAGE_ID]", "a tag typed by hand names any image; the archive carries its own"),
    "manual.docker-ps": (
        "docker ps shows containers, so rootless did not start",
        "the shell then talks to the daemon of root; docker info says `rootless` in SecurityOptions",
    ),
}


@dataclass(frozen=True)
class Explanation:
    """One value: its dotted key, what it is, who set it (and where), and why."""

    key: str
    value: str
    set_by: str
    why: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value}\n  set by {self.set_by}" + (f"\n  {self.why}" if self.why else "")


def explanations(spec: JobSpec, fit: Fit, plan: LaunchPlan) -> Iterator[Explanation]:
    """Every value of a job and of its plan, in the order in which people look for them."""
    yield from _of_job(spec)
    for group, settings in _groups(plan):
        for setting in settings:
            value = "(set)" if setting.value is None else setting.value
            yield Explanation(f"{group}.{setting.name}", value, setting.set_by, setting.why)
    for module in plan.modules:
        origin = set_by(spec, f"cluster.runtimes.{plan.runtime}.modules")
        yield Explanation("modules", module, origin, f"loaded before {plan.runtime} is used")
    yield Explanation("runtime", plan.runtime, set_by(spec, "runtime"), _runtime_reason(spec))
    yield from _of_fit(fit)
    for key, (text, why) in CORRECTIONS.items():
        yield Explanation(key, text, "the CPM-9G manual", f"corrected: {why}")


def _of_fit(fit: Fit) -> Iterator[Explanation]:
    for demand in fit.demands:
        parts = "; ".join(f"{c.name} {format_size(c.bytes)}: {_basis(c.formula, c.source)}" for c in demand.components)
        value = f"{demand.size} for each {demand.per}, {demand.verdict}"
        yield Explanation(f"fit.{demand.resource.replace(' ', '_')}", value, "computed", f"{demand.instant}: {parts}")
    if fit.time:
        terms = "; ".join(f"{t.name} {t.seconds:.3g} s: {_basis(t.formula, t.source)}" for t in fit.time.step.terms)
        value = f"{fit.time.size}, {fit.time.verdict}; {fit.time.limit}"
        yield Explanation("fit.time", value, "computed", f"{fit.time.steps:,} steps of {terms}")
    if fit.cost and fit.cost.price_usd:
        yield Explanation("fit.price", f"{fit.cost.price_usd.value:,.0f} USD", "computed", fit.cost.price_source)


def _basis(formula: str, source: str) -> str:
    return f"{formula} ({source})" if source else formula


def matching(found: list[Explanation], key: str) -> list[Explanation]:
    """Those whose key is `key`, lies below it, or ends in it (`shm-size` for `docker.shm-size`)."""
    exact = [e for e in found if e.key == key or e.key.startswith(key + ".")]
    return exact or [e for e in found if e.key.split(".", 1)[-1] == key]


def _groups(plan: LaunchPlan) -> list[tuple[str, tuple[Setting, ...]]]:
    return [
        ("sbatch", plan.batch),
        ("srun", plan.step),
        ("interactive", plan.interactive),
        (plan.runtime.split("-")[0], run_options(plan, SYMBOLIC_NODE)),
        ("env", plan.environment),
    ]


def _of_job(spec: JobSpec) -> Iterator[Explanation]:
    """What the job, its profile and its cluster say, and the defaults of the rest; `env` comes with the plan."""
    known = [*described(spec), *described(spec.cluster, "cluster")]
    known += described(spec.method, "method.lora") if spec.method else ()
    meanings = {key: (value, doc) for key, value, doc in known}
    for key in sorted({*spec.origins, *meanings} - {"runtime"}):
        value, doc = meanings.get(key, (None, ""))
        origin = spec.origins.get(key)
        if key.startswith("env."):
            continue
        if origin:
            yield Explanation(key, origin.text, str(origin), doc)
        elif isinstance(value, (str, int, float)):
            yield Explanation(key, str(value).lower() if isinstance(value, bool) else str(value), "default", doc)


def _runtime_reason(spec: JobSpec) -> str:
    return "as the job asks" if spec.runtime else f"the first that {spec.cluster_name} offers and this job can use"
