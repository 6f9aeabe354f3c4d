"""The words of YellowDog's API that a request may use; a mistyped one would find nothing, without a word.

Source: the enums and list items of YellowDog's SDK 15.9 (``yellowdog_client.model``); a test compares them.
"""

from __future__ import annotations

__all__ = [
    "COMPUTE_STATUSES",
    "ERROR_TYPES",
    "INSTANCE_STATUSES",
    "NODE_STATUSES",
    "POOL_STATUSES",
    "POOL_TYPES",
    "PRICING",
    "PROVIDERS",
    "SORT_COMPUTE",
    "SORT_COMPUTE_SUMMARIES",
    "SORT_INSTANCES",
    "SORT_NAMESPACES",
    "SORT_NODES",
    "SORT_POOLS",
    "SORT_SOURCES",
    "SORT_TASKS",
    "SORT_TEMPLATES",
    "SORT_WORK",
    "TASK_STATUSES",
    "WORKER_STATUSES",
    "WORK_STATUSES",
]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


WORK_STATUSES = _words("RUNNING HELD FINISHING COMPLETED FAILED CANCELLING CANCELLED")
TASK_STATUSES = _words(
    "PENDING READY ALLOCATED DOWNLOADING EXECUTING UPLOADING COMPLETED FAILED ABORTED CANCELLED DISCARDED "
    "RESUBMITTED"
)
POOL_STATUSES = _words("PENDING CONFIGURING EMPTY IDLE RUNNING SHUTDOWN TERMINATED")
NODE_STATUSES = _words("RUNNING LATE LOST DEREGISTERED TERMINATED")
WORKER_STATUSES = _words("DOING_TASK SLEEPING STOPPED STARTING BATCH_ALLOCATION LATE LOST RUNNING SHUTDOWN")
COMPUTE_STATUSES = _words("NEW PROVISIONING STARTING RUNNING STOPPING STOPPED TERMINATING TERMINATED")
INSTANCE_STATUSES = _words("PENDING RUNNING STOPPING STOPPED TERMINATING TERMINATED UNAVAILABLE UNKNOWN")
PROVIDERS = _words("AWS AZURE GOOGLE OCI ON_PREMISE")
PRICING = _words("ON_DEMAND_ONLY ON_DEMAND_THEN_SPOT SPOT_ONLY SPOT_THEN_ON_DEMAND")
ERROR_TYPES = _words(
    "ALLOCATION_LOST RESOURCE_REQUEST_FAILED TIMED_OUT UNABLE_START_PROCESS PROCESS_NON_ZERO_EXIT "
    "DATA_CLIENT_DISABLED UNKNOWN_ERROR OUTPUT_NOT_FOUND INPUT_NOT_FOUND TRANSITION_REFUSED "
    "UNABLE_WRITE_TASK_DATA"
)
POOL_TYPES = frozenset(
    f"{package}{kind}"
    for kind in ("ProvisionedWorkerPool", "ConfiguredWorkerPool")
    for package in ("", "co.yellowdog.platform.model.")
)

# The fields of a list's items that hold one value.
_NAMED = "id namespace name tag createdTime status statusChangedTime"
SORT_WORK = _words(f"{_NAMED} priority completedTaskCount totalTaskCount healthy")
SORT_TASKS = _words(
    "id status retryCount taskGroupId nodeId workerId name tag taskType startedTime finishedTime "
    "abortRequestedTime resubmittedToTaskId resubmittedFromTaskId timeout taskData"
)
SORT_POOLS = _words(
    "id name namespace type status createdTime statusChangedTime healthy registeredNodeCount "
    "registeredWorkerCount claimedWorkerCount workingWorkerCount"
)
SORT_NODES = _words(
    "id workerPoolId status statusChangedTime registeredTime deregisteredTime preemptionWarningTime "
    "actionQueueStatus agentVersion"
)
SORT_COMPUTE = _words(
    f"{_NAMED} createdById createdFromId targetInstanceCount expectedInstanceCount maintainInstanceCount "
    "nextStatus autoShutdownTime"
)
SORT_COMPUTE_SUMMARIES = _words(
    f"{_NAMED} targetInstanceCount expectedInstanceCount aliveInstanceCount healthy"
)
SORT_INSTANCES = _words(
    "type createdTime provider instanceType region subregion imageId hostname privateIpAddress "
    "publicIpAddress spot status statusChangedTime"
)
SORT_TEMPLATES = _words("id name namespace description strategyType type")
SORT_SOURCES = _words("id name namespace description sourceType provider")
SORT_NAMESPACES = _words("id namespace deletable")
