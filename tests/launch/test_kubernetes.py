"""The JobSet for Kubernetes: its fields, its rights, and what it starts again."""

import re
from typing import Any

import kubernetes_validate
import pytest
import yaml
from stand_ins import LAUNCH

from deepsc_jax.runtime import exit_codes

# An image by its digest: https://github.com/opencontainers/distribution-spec
BY_DIGEST = re.compile(r"[a-z0-9][a-z0-9._:/-]*/[a-z0-9._/-]+@sha256:[0-9a-f]{64}")


def validate(jobset: dict[str, Any]) -> None:
    """As the cluster would: every field known, and images by their digest.

    Raises:
      ValidationError: something is not as Kubernetes or JobSet has it.
      ValueError: an image is not named by a digest.
    """
    spec, policy = jobset["spec"], jobset["spec"]["failurePolicy"]
    # https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(spec) <= {"network", "failurePolicy", "successPolicy", "replicatedJobs", "suspend"}
    assert set(spec["network"]) <= {"enableDNSHostnames", "publishNotReadyAddresses", "subdomain"}
    assert set(policy) <= {"maxRestarts", "restartStrategy", "rules"}
    on = {"onJobFailureReasons", "onJobFailureMessagePatterns"}
    for rule in policy["rules"]:
        assert {"name", "action"} <= set(rule) <= {"name", "action"} | on
    for replicated in spec["replicatedJobs"]:
        assert {"name", "template"} <= set(replicated) <= {"name", "template", "replicas"}
        job = {"apiVersion": "batch/v1", "kind": "Job", **replicated["template"]}
        kubernetes_validate.validate(job, "1.31", strict=True)  # no field that it does not know
        for container in job["spec"]["template"]["spec"]["containers"]:
            if not BY_DIGEST.fullmatch(container["image"]):
                raise ValueError(f"{container['image']}: not an image by its digest")


def test_the_jobset_is_valid_once_its_image_is_put_in() -> None:
    text = (LAUNCH / "kubernetes.yaml").read_text()
    with pytest.raises(ValueError, match="PUT-THE-DIGEST-HERE: not an image by its digest"):
        validate(yaml.safe_load(text))
    placeholder = "REGISTRY/deepsc_jax@sha256:PUT-THE-DIGEST-HERE"
    assert text.count(placeholder) == 1
    filled = text.replace(placeholder, f"registry.example/deepsc_jax@sha256:{'0af9' * 16}")
    validate(yaml.safe_load(filled))
    misspelt = filled.replace("parallelism: 8", "paralelism: 8")
    with pytest.raises(kubernetes_validate.ValidationError, match="paralelism"):
        validate(yaml.safe_load(misspelt))


def test_what_the_jobset_leaves_to_the_cluster_is_valid_too() -> None:
    text = (LAUNCH / "kubernetes.yaml").read_text()
    image = f"registry.example/deepsc_jax@sha256:{'0af9' * 16}"
    text = re.sub(r"image: .*", f"image: {image}", text)
    kept = re.compile(r"# ((hostNetwork|dnsPolicy|rdma/\w+|add|- name|  value)\b.*)")
    lines = text.splitlines()
    uncommented = [kept.sub(r"\1", line) for line in lines]
    assert sum(a != b for a, b in zip(lines, uncommented, strict=True)) >= 14
    validate(yaml.safe_load("\n".join(uncommented)))


def test_pods_keep_what_was_compiled_and_run_with_few_rights() -> None:
    jobset: dict[str, Any] = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {one["name"]: one["value"] for one in container["env"]}
    (shared,) = (m["mountPath"] for m in container["volumeMounts"] if m["name"] == "shared")
    assert env["JAX_COMPILATION_CACHE_DIR"].startswith(f"{shared}/")
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_the_jobset_is_one_job_of_processes_that_find_each_other() -> None:
    jobset: dict[str, Any] = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = jobset["spec"]
    assert spec["network"]["enableDNSHostnames"] is True
    (replicated,) = spec["replicatedJobs"]
    assert replicated["replicas"] == 1
    job = replicated["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    flags = dict(arg.removeprefix("--").split("=", 1) for arg in container["args"])
    host, port = flags["coordinator"].split(":")
    name = jobset["metadata"]["name"]
    assert host == f"{name}-{replicated['name']}-0-0.{name}"  # JobSet's name of its first pod
    assert [p["containerPort"] for p in container["ports"]] == [int(port)]
    assert flags["num_processes"] == str(job["parallelism"])
    assert flags["process_id"] == "$(JOB_COMPLETION_INDEX)"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_jobset_starts_again_what_the_table_of_codes_does() -> None:
    spec = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["backoffLimit"] == 0  # one lost pod fails the job: JobSet starts all of them again
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy demands
    assert pod["terminationGracePeriodSeconds"] == 120
    ended, preempted, disrupted = job["podFailurePolicy"]["rules"]
    for rule in (ended, preempted):
        assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
        assert rule["onExitCodes"]["operator"] == "In"
    codes = {code for name, code in vars(exit_codes).items() if isinstance(code, int)}
    codes -= {exit_codes.DONE, exit_codes.MOST_RESTARTS}
    again = {*exit_codes.REQUEUED_ALWAYS, *exit_codes.REQUEUED_AT_MOST}
    assert set(ended["onExitCodes"]["values"]) == codes - again
    assert set(preempted["onExitCodes"]["values"]) == set(exit_codes.REQUEUED_ALWAYS)
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert {rule["action"] for rule in (ended, preempted, disrupted)} == {"FailJob"}
    policy = spec["failurePolicy"]
    assert policy["maxRestarts"] == exit_codes.MOST_RESTARTS
    # What Kubernetes says of a job that a rule failed ends so, with the rule's place.
    said = [f"... with exit code 1 matching FailJob rule at index {i}" for i in range(3)]
    found = {
        rule["action"]: [
            i
            for i, message in enumerate(said)
            if any(re.search(p, message) for p in rule["onJobFailureMessagePatterns"])
        ]
        for rule in policy["rules"]
    }
    assert found == {"FailJobSet": [0], "RestartJobSetAndIgnoreMaxRestarts": [1, 2]}
