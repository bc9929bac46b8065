"""What ships with cpm-cluster: every config and job file is whole, current, and says what its source says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cpm_cluster.specs.catalogue import Catalogue, default_catalogue
from cpm_cluster.specs.cluster import Cluster
from cpm_cluster.specs.compose import load_job
from cpm_cluster.specs.fields import Reading, Section
from cpm_cluster.specs.gpu import Gpu
from cpm_cluster.specs.image import Image
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.model import Model
from cpm_cluster.specs.nodes import Node, ScalarNode, read_yaml
from cpm_cluster.specs.problems import Location, Problem, SpecError
from cpm_cluster.specs.profile import Profile
from cpm_cluster.specs.schema import KINDS, json_schema

CHECKOUT = Path(__file__).resolve().parents[3]
CONFIGS = CHECKOUT / "configs"
JOBS = sorted((CHECKOUT / "jobs").glob("*.yaml"))
FOLDERS: dict[str, type[Any]] = {"profiles": Profile, "clusters": Cluster, "models": Model, "images": Image}
CONFIG_FILES = [path for folder in FOLDERS for path in sorted((CONFIGS / folder).glob("*.yaml"))]
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))
GIB = 1 << 30

COMMAND_JOB = "name: x\nengine: command\ncommand: [python, x.py]\n"


def _read(path: Path, spec: type[Any]) -> Any:
    problems: list[Problem] = []
    node = read_yaml(path, "test", problems)
    assert node is not None, problems
    return Section(spec).read(node, "", Reading(problems))


def _profile(name: str) -> Profile:
    profile: Profile = _read(CONFIGS / "profiles" / f"{name}.yaml", Profile)
    return profile


def _gpus() -> dict[str, Node]:
    node = read_yaml(CONFIGS / "gpus.yaml", "test", [])
    assert node is not None
    return node.entries


def _gpu(node: Node) -> Gpu:
    gpu: Gpu = Section(Gpu).read(node, "", Reading([]))
    return gpu


def _shown(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    """What someone has who has written no config of their own."""
    return default_catalogue(tmp_path / "working", tmp_path / "home")


def _load(tmp_path: Path, text: str, catalogue: Catalogue, *overrides: str, detected: str = "local") -> JobSpec:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return load_job(path, overrides, catalogue, detected)


class TestEveryFile:
    @pytest.mark.parametrize("path", CONFIG_FILES, ids=_shown)
    def test_a_config_reads_without_a_problem_and_says_where_its_facts_are_from(self, path: Path) -> None:
        assert _read(path, FOLDERS[path.parent.name]).source

    @pytest.mark.parametrize("name", _gpus())
    def test_a_gpu_has_the_memory_of_its_name_and_bf16_since_ampere(self, name: str) -> None:
        gpu = _gpu(_gpus()[name])
        nominal_gib = int(name.rsplit("-", 1)[1].removesuffix("g"))
        assert 0.9 * nominal_gib <= gpu.memory_mib / 1024 <= 1.01 * nominal_gib
        assert gpu.has_bf16 == (gpu.sm >= 80)

    @pytest.mark.parametrize("path", JOBS, ids=_shown)
    def test_a_job_loads_without_a_problem_or_warning(self, path: Path, catalogue: Catalogue) -> None:
        assert load_job(path, (), catalogue, "local").warnings == ()

    @pytest.mark.parametrize("path", sorted((CONFIGS / "images").glob("*.yaml")), ids=_shown)
    def test_an_image_is_found_under_its_tag(self, path: Path, catalogue: Catalogue) -> None:
        assert catalogue.find("images", _read(path, Image).tag) == path

    def test_every_gpu_that_a_config_names_is_in_the_catalogue(self) -> None:
        named = {_read(path, Cluster).gpu for path in (CONFIGS / "clusters").glob("*.yaml")}
        named |= {_read(path, Profile).resources.gpu for path in (CONFIGS / "profiles").glob("*.yaml")}
        assert named - {None} <= set(_gpus())


class TestSchemas:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_schema_that_ships_is_the_one_of_the_specs(self, kind: str) -> None:
        shipped = json.loads((CONFIGS / "schema" / f"{kind}.schema.json").read_text(encoding="utf-8"))
        assert shipped == json_schema(kind), f"run: cpm schema {kind} > configs/schema/{kind}.schema.json"
        jsonschema.Draft202012Validator.check_schema(shipped)

    @pytest.mark.parametrize("path", [*CONFIG_FILES, CONFIGS / "gpus.yaml", *JOBS], ids=_shown)
    def test_a_file_fits_the_schema_that_its_first_line_names_to_editors(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        start = "# yaml-language-server: $schema="
        first = text.splitlines()[0]
        assert first.startswith(start)
        schema = path.parent / first.removeprefix(start)
        assert schema.name == path.parent.name.removesuffix("s") + ".schema.json" or path.name == "gpus.yaml"
        jsonschema.validate(yaml.safe_load(text), json.loads(schema.read_text(encoding="utf-8")))

    @pytest.mark.parametrize(
        "line",
        [
            "description:",
            "training:",
            "training: {lr: 1e-4, schedule: , checkpoint: , betas: [0.9, 0.95]}",
            "method:",
            "method: {lora: }",
            "slurm: {nodelist: , extra: {comment: x}}",
            "mounts:",
            "model: {base: cpm-9g-8b, layers: 4, kv_heads: }",
            "image: {tag: a/b:1, archive: }",
            "time_limit: 1h30m",
            "time_limit: 2-00:00:00",
            "env: {A: 1, B: true, C: 0.5}",
            "resources: {memory_per_node: 1.5TiB, shm: }",
        ],
    )
    def test_it_accepts_what_the_loader_accepts(self, line: str, tmp_path: Path, catalogue: Catalogue) -> None:
        text = COMMAND_JOB + "profile: cpu-2\n" + line
        assert _load(tmp_path, text, catalogue, detected="slurm").name == "x"
        jsonschema.validate(yaml.safe_load(text), json_schema("job"))

    @pytest.mark.parametrize("line", ["resources: {gpus: 1}", "training: {lr: 0}", "time_limit: 24", "runtime: lxc"])
    def test_it_refuses_what_the_loader_refuses(self, line: str, tmp_path: Path, catalogue: Catalogue) -> None:
        text = COMMAND_JOB + "profile: cpu-2\n" + line
        with pytest.raises(SpecError, match=line.split(":")[0]):
            _load(tmp_path, text, catalogue)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(yaml.safe_load(text), json_schema("job"))


class TestTheManualsResourceTables:
    @pytest.mark.parametrize(
        ("name", "nodes", "gpus_per_node", "memory_gib"),
        [
            ("full-100b-64x80g", 8, 8, 512),
            ("lora-100b-8x80g", 1, 8, 512),
            ("infer-100b-8x80g", 1, 8, 512),
            ("full-10b-16x80g", 2, 8, 512),
            ("lora-10b-2x80g", 1, 2, 128),
            ("infer-10b-2x80g", 1, 2, 128),
            ("minimal-train-10b", 1, 1, 140),
            ("minimal-infer-10b", 1, 1, 1),
            ("minimal-train-100b", 1, 8, 200),
            ("minimal-infer-100b", 1, 4, 2),
        ],
    )
    def test_each_row_is_a_profile(self, name: str, nodes: int, gpus_per_node: int, memory_gib: int) -> None:
        asked = _profile(name).resources
        assert (asked.nodes, asked.gpus_per_node) == (nodes, gpus_per_node)
        assert asked.memory_per_node_bytes == memory_gib * GIB

    @pytest.mark.parametrize(
        ("name", "figure"),
        [
            ("minimal-train-10b", "49 GB"),
            ("minimal-infer-10b", "20 GB"),
            ("minimal-train-100b", "eight 80 GB GPUs"),
            ("minimal-infer-100b", "four GPUs with 50 GB"),
        ],
    )
    def test_the_gpu_memory_of_a_minimum_is_in_its_description(self, name: str, figure: str) -> None:
        assert figure in _profile(name).description

    @pytest.mark.parametrize(
        "name", ["minimal-train-10b", "minimal-infer-10b", "minimal-train-100b", "minimal-infer-100b"]
    )
    def test_a_minimum_warns_at_every_submission(self, name: str, tmp_path: Path, catalogue: Catalogue) -> None:
        job = _load(tmp_path, COMMAND_JOB + f"profile: {name}\n", catalogue)
        assert len(job.warnings) == 1
        assert "bare minimum for reference, which" in job.warnings[0]
        assert "does not recommend" in job.warnings[0]

    def test_the_100b_minimum_says_that_it_ran_out_of_memory_and_what_to_use(
        self, tmp_path: Path, catalogue: Catalogue
    ) -> None:
        (warning,) = _load(tmp_path, COMMAND_JOB + "profile: minimal-train-100b\n", catalogue).warnings
        assert "ran out of memory" in warning
        assert "at least two such nodes" in warning
        assert "full-100b-64x80g" in warning

    @pytest.mark.parametrize("path", sorted((CONFIGS / "profiles").glob("*.yaml")), ids=_shown)
    def test_other_profiles_warn_of_nothing(self, path: Path) -> None:
        assert (_read(path, Profile).warning is not None) == path.name.startswith("minimal-")

    @pytest.mark.parametrize("path", sorted((CONFIGS / "profiles").glob("*.yaml")), ids=_shown)
    def test_no_profile_asks_for_more_shared_memory_than_memory(self, path: Path) -> None:
        asked = _read(path, Profile).resources
        assert (asked.shm_bytes or 0) <= (asked.memory_per_node_bytes or asked.shm_bytes or 0)


class TestTheManualsSite:
    def test_nine_g_has_the_partition_nodes_module_and_environment_of_the_manual(self) -> None:
        site: Cluster = _read(CONFIGS / "clusters" / "nine-g.yaml", Cluster)
        assert site.default_partition == "gpu1"
        assert site.node_names == "g[2001-2008]"
        assert (site.gpus_per_node, site.gpu, site.gpu_request) == (8, "a100-80g", "gres")
        assert site.cpus_per_node == 8 * 8
        assert site.driver == "470.57.02"
        assert next(iter(site.runtimes)) == "docker-rootless"
        assert site.runtimes["docker-rootless"].modules == ("rootless-docker/default",)
        assert site.runtimes["conda"].environment == "cpm-9g"

    def test_cpmlive_flash_has_the_versions_of_the_manual(self) -> None:
        image: Image = _read(CONFIGS / "images" / "cpmlive-flash-0.0.4.yaml", Image)
        assert (image.python, image.torch, image.cuda) == ("3.8.10", "1.13.1", "11.6")
        assert (image.bmtrain, image.flash_attn) == ("0.2.3.post2", "2.0.8")
        assert image.archive is not None
        assert image.archive.file == "cpmlive-flash-0.0.4.tar"
        assert image.archive.url is not None
        assert image.archive.url.endswith("/cpmlive-flash-0.0.4.tar")

    def test_a_job_for_any_slurm_site_needs_no_partition_since_slurm_has_a_default(
        self, tmp_path: Path, catalogue: Catalogue
    ) -> None:
        job = _load(tmp_path, COMMAND_JOB + "profile: node-8gpu\n", catalogue, detected="slurm")
        assert job.cluster_name == "slurm"
        assert job.slurm.partition is None

    def test_full_100b_asks_for_docker_because_rootless_docker_has_no_host_network_there(
        self, catalogue: Catalogue
    ) -> None:
        path = CHECKOUT / "jobs" / "full_100b.yaml"
        assert load_job(path, (), catalogue, "local").runtime == "docker"
        with pytest.raises(SpecError, match=r"runtime: .*no host network in Docker 20\.10"):
            load_job(path, ["runtime=docker-rootless"], catalogue, "local")

    def test_the_flagship_is_the_manuals_lora_run(self, catalogue: Catalogue) -> None:
        job = load_job(CHECKOUT / "jobs" / "lora_100b.yaml", (), catalogue, "local")
        assert (job.model_name, job.cluster_name, job.engine) == ("cpm-9g-100b", "nine-g", "bmtrain")
        assert (job.slurm.partition, job.slurm.nodelist) == ("gpu1", "g2001")
        assert (job.resources.nodes, job.resources.gpus_per_node) == (1, 8)
        assert job.method is not None
        assert (job.method.rank, job.method.alpha, job.method.dropout) == (64, 64, 0.05)
        assert job.method.targets == ("project_q", "project_v", "project_k", "w_0", "w_1", "w_out")
        assert job.image is not None
        assert job.image.tag == "cpmlive-flash:0.0.4"
        assert job.time_limit_s == 24 * 3600


class TestHopper:
    CLUSTER = (
        "scheduler: slurm\ngpu: h100-80g\ngpus_per_node: 8\ndefault_partition: p\ndefault_time: 1h\n"
        "runtimes: {docker: {}}\n"
    )
    JOB = COMMAND_JOB + "profile: lora-100b-8x80g\ncluster: ./h100.yaml\n"

    @pytest.fixture(autouse=True)
    def _cluster(self, tmp_path: Path) -> None:
        (tmp_path / "h100.yaml").write_text(self.CLUSTER, encoding="utf-8")

    def test_cpmlive_flash_is_refused_because_it_has_no_code_for_sm_90(
        self, tmp_path: Path, catalogue: Catalogue
    ) -> None:
        with pytest.raises(SpecError) as refused:
            _load(tmp_path, self.JOB + "image: cpmlive-flash:0.0.4\n", catalogue)
        (problem,) = refused.value.problems
        assert problem.key == "image"
        assert problem.what.startswith("cpmlive-flash:0.0.4 (CUDA 11.6) has no code for NVIDIA H100")
        assert "sm_90" in problem.what

    def test_the_profiles_leave_the_type_of_gpu_to_the_cluster(self, tmp_path: Path, catalogue: Catalogue) -> None:
        job = _load(tmp_path, self.JOB + "image: cpmlive-flash-next:0.1\n", catalogue)
        assert job.gpu is not None
        assert job.gpu.sm == 90

    def test_the_newer_image_is_refused_by_the_old_driver_of_nine_g(self, catalogue: Catalogue) -> None:
        with pytest.raises(SpecError, match=r"needs NVIDIA driver 525\.60\.13 or newer; nine-g has 470\.57\.02"):
            load_job(CHECKOUT / "jobs" / "lora_100b.yaml", ["image=cpmlive-flash-next:0.1"], catalogue, "local")


class TestModels:
    # biases, learned positions and (GLM, BERT) further norms and heads are not in Model.parameters
    BOUND = {"cpm9g": 0.015, "decoder": 0.015, "glm": 0.03, "bert": 0.03, "t5": 0.05}

    @pytest.mark.parametrize("path", MODELS, ids=_shown)
    def test_the_shape_has_the_parameters_that_are_stated(self, path: Path) -> None:
        model: Model = _read(path, Model)
        assert model.parameters_stated is not None
        assert model.parameters / 1e9 == pytest.approx(model.parameters_stated, rel=self.BOUND[model.block])

    @pytest.mark.parametrize(
        ("name", "layers", "hidden", "heads", "ffn", "vocab"),
        [
            ("cpm-ant-10b", 48, 4096, 32, 10240, 30720),
            ("cpm-bee-10b", 48, 4096, 32, 10240, 86583),
            ("cpm-9g-7b", 32, 4096, 32, 11008, 119696),
            ("cpm-9g-8b", 32, 4096, 32, 14336, 119696),
            ("cpm-9g-11b", 48, 4096, 32, 12288, 119696),
        ],
    )
    def test_the_cpm_family_has_its_published_dimensions(
        self, name: str, layers: int, hidden: int, heads: int, ffn: int, vocab: int
    ) -> None:
        model: Model = _read(CONFIGS / "models" / f"{name}.yaml", Model)
        assert (model.layers, model.hidden, model.heads, model.ffn, model.vocab) == (layers, hidden, heads, ffn, vocab)
        assert model.size_of_head == 128
        assert model.assumed is None

    def test_the_100b_shape_is_marked_as_assumed_and_comes_to_100e9(self) -> None:
        model: Model = _read(CONFIGS / "models" / "cpm-9g-100b.yaml", Model)
        assert model.assumed is not None
        assert "Only the 80 layers are documented" in model.assumed
        assert (model.layers, model.size_of_head, model.vocab) == (80, 128, 119696)
        assert model.parameters == 100_180_305_920

    def test_the_100b_shape_can_be_corrected_in_the_job_and_on_the_command_line(
        self, tmp_path: Path, catalogue: Catalogue
    ) -> None:
        text = COMMAND_JOB + "profile: cpu-2\nmodel: {base: cpm-9g-100b, hidden: 9216, heads: 72}\n"
        model = _load(tmp_path, text, catalogue, "model.ffn=32256").model
        assert model is not None
        assert (model.layers, model.hidden, model.heads, model.ffn) == (80, 9216, 72, 32256)


class TestYourOwnFilesWin:
    @staticmethod
    def _write(folder: Path, nodes: int) -> None:
        path = folder / "profiles" / "lora-100b-8x80g.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(f"description: mine\nresources: {{nodes: {nodes}, gpus_per_node: 0}}\n", encoding="utf-8")

    def _nodes(self, tmp_path: Path, catalogue: Catalogue) -> int:
        text = COMMAND_JOB + "profile: lora-100b-8x80g\n"
        return _load(tmp_path, text, catalogue, detected="slurm").resources.nodes

    def test_a_profile_of_your_home_wins_by_name_over_the_packaged_one(
        self, tmp_path: Path, catalogue: Catalogue
    ) -> None:
        assert self._nodes(tmp_path, catalogue) == 1
        self._write(tmp_path / "home" / "cpm-cluster", 3)
        assert self._nodes(tmp_path, catalogue) == 3

    def test_a_profile_beside_your_work_wins_over_that_of_your_home(self, tmp_path: Path, catalogue: Catalogue) -> None:
        self._write(tmp_path / "home" / "cpm-cluster", 3)
        self._write(tmp_path / "working" / "configs", 4)
        assert self._nodes(tmp_path, catalogue) == 4

    def test_an_image_is_found_by_its_tag_in_your_files_too(self, tmp_path: Path, catalogue: Catalogue) -> None:
        path = tmp_path / "working" / "configs" / "images" / "cpmlive-flash-0.0.4.yaml"
        path.parent.mkdir(parents=True)
        path.write_text("tag: cpmlive-flash:0.0.4\nsource: mine\n", encoding="utf-8")
        problems: list[Problem] = []
        name = ScalarNode("cpmlive-flash:0.0.4", True, Location("job.yaml", 1, 1), "job")
        node = catalogue.load("images", name, "image", tmp_path, problems)
        assert problems == []
        assert node is not None
        assert node.where.file == "configs/images/cpmlive-flash-0.0.4.yaml"
        assert Section(Image).read(node, "", Reading(problems)).source == "mine"

    def test_a_gpu_of_your_gpus_yaml_replaces_that_one_alone(self, tmp_path: Path, catalogue: Catalogue) -> None:
        path = tmp_path / "working" / "configs" / "gpus.yaml"
        path.parent.mkdir(parents=True)
        figures = "memory_mib: 81920, sm: 80, memory_bandwidth_gb_s: 2039, peak_fp16_tflops: 312"
        path.write_text(f"a100-80g: {{product: A100, {figures}, source: mine}}\n", encoding="utf-8")
        gpus = catalogue.gpus([])
        assert set(gpus) == set(_gpus())
        assert _gpu(gpus["a100-80g"]).source == "mine"
        assert _gpu(gpus["h100-80g"]) == _gpu(_gpus()["h100-80g"])
