"""What KubeRay's RayJob and SkyPilot's task may hold, as far as our jobs go, written from their
documented fields: docs.ray.io (Kubernetes, RayJob), docs.skypilot.co (YAML specification).

Unknown keys are refused, so that a misspelled one is found.
"""

from typing import Any

NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
COUNT = {"type": "integer", "minimum": 1}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(m|Ki|Mi|Gi|Ti)?$"}


def exactly(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the schema of an object with these keys and no others."""
    return {
        "type": "object",
        "required": sorted(required),
        "properties": {**required, **(optional or {})},
        "additionalProperties": False,
    }


METADATA = exactly({"name": NAME}, {"namespace": NAME, "labels": {"type": "object"}})
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY, "required": ["cpu", "memory"]}
CONTAINER = exactly(
    {
        "name": NAME,
        "image": {"type": "string", "minLength": 1},
        "resources": exactly({"requests": QUANTITIES, "limits": QUANTITIES}),
    },
    {
        "volumeMounts": {
            "type": "array",
            "items": exactly(
                {"name": NAME, "mountPath": {"type": "string", "pattern": "^/"}},
                {"readOnly": {"type": "boolean"}},
            ),
        }
    },
)
VOLUME = {
    "oneOf": [
        exactly({"name": NAME, "persistentVolumeClaim": exactly({"claimName": NAME})}),
        exactly({"name": NAME, "configMap": exactly({"name": NAME})}),
        exactly({"name": NAME, "emptyDir": exactly({}, {"medium": {"const": "Memory"}})}),
    ]
}
POD = exactly(
    {
        "spec": exactly(
            {"containers": {"type": "array", "items": CONTAINER, "minItems": 1}},
            {
                "volumes": {"type": "array", "items": VOLUME},
                "terminationGracePeriodSeconds": COUNT,
            },
        )
    }
)
# KubeRay hands these to `ray start`, as texts.
START = {"type": "object", "additionalProperties": {"type": "string"}}
RAY_JOB = exactly(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": METADATA,
        "spec": exactly(
            {
                "entrypoint": {"type": "string", "minLength": 1},
                "rayClusterSpec": exactly(
                    {
                        "headGroupSpec": exactly({"rayStartParams": START, "template": POD}),
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": exactly(
                                {
                                    "groupName": NAME,
                                    "replicas": COUNT,
                                    "minReplicas": COUNT,
                                    "maxReplicas": COUNT,
                                    "rayStartParams": START,
                                    "template": POD,
                                }
                            ),
                        },
                    },
                    {
                        "rayVersion": {"type": "string"},
                        "authOptions": exactly({"mode": {"enum": ["token", "disabled"]}}),
                    },
                ),
            },
            {
                "backoffLimit": {"type": "integer", "minimum": 0},
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "ttlSecondsAfterFinished": {"type": "integer", "minimum": 0},
            },
        ),
    }
)
CONFIG_MAP = exactly(
    {
        "apiVersion": {"const": "v1"},
        "kind": {"const": "ConfigMap"},
        "metadata": METADATA,
        "data": {"type": "object", "additionalProperties": {"type": "string"}},
    }
)
SKYPILOT_TASK = exactly(
    {"run": {"type": "string", "minLength": 1}},
    {
        "name": NAME,
        "num_nodes": COUNT,
        "resources": exactly(
            {},
            {
                "accelerators": {"type": "string", "pattern": "^[A-Za-z0-9-]+:[0-9]+$"},
                "image_id": {"type": "string", "pattern": "^docker:"},
                "use_spot": {"type": "boolean"},
            },
        ),
        "volumes": {"type": "object", "additionalProperties": NAME},
        "setup": {"type": "string"},
    },
)
