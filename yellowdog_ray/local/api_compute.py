"""The part of the HTTP API that is about compute: requirements, instances, templates."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from yellowdog_ray.local import wire
from yellowdog_ray.local.asks import RefusedError, Template
from yellowdog_ray.local.entities import ComputeRequirement, Instance
from yellowdog_ray.local.fields import MAX_NODES, Fields
from yellowdog_ray.local.intake import read_auto_shutdown, read_usage
from yellowdog_ray.local.sorting import (
    SORT_COMPUTE,
    SORT_COMPUTE_SUMMARIES,
    SORT_INSTANCES,
    SORT_SOURCES,
    SORT_TEMPLATES,
)
from yellowdog_ray.local.vocabulary import (
    COMPUTE_STATUSES,
    INSTANCE_STATUSES,
    PROVIDERS,
)
from yellowdog_ray.local.web import Action, Call, stream

__all__ = ["ROUTES"]


async def _provision(call: Call) -> Any:
    requirement = call.scheduler.provision(read_usage(await call.body()), call.now)
    call.core.changed()
    return wire.requirement_json(requirement)


async def _requirements(call: Call) -> Any:
    named, healthy = call.named(tagged=True), call.flag("isHealthy")
    statuses = call.words("statuses", COMPUTE_STATUSES)
    created = call.within("createdTime")
    summaries = call.flag("summaries")
    write = wire.requirement_summary if summaries else wire.requirement_json

    def wanted(requirement: ComputeRequirement) -> bool:
        usage = requirement.usage
        return (
            named(usage.namespace, usage.name, usage.tag)
            and (not statuses or requirement.status in statuses)
            and (healthy is None or wire.requirement_healthy(requirement) == healthy)
            and created(requirement.created)
        )

    sortable = SORT_COMPUTE_SUMMARIES if summaries else SORT_COMPUTE
    return call.slice(call.scheduler.requirements.values(), wanted, write, sortable)


async def _requirement(call: Call) -> Any:
    return wire.requirement_json(call.scheduler.requirement(call.path("id")))


async def _requirement_named(call: Call) -> Any:
    return wire.requirement_json(call.scheduler.requirement_named(call.path("namespace"), call.path("name")))


async def _update_requirement(call: Call) -> Any:
    """Resize a requirement: of what a client sends back, only ``targetInstanceCount`` may be changed."""
    fields = Fields(await call.body(), "computeRequirement")
    requirement = call.scheduler.requirement(fields.need("id"))
    known = wire.requirement_json(requirement)
    same = {key: fields.get(key) == known.get(key) for key in ("namespace", "name", "tag", "createdFromId")}
    same["maintainInstanceCount"] = fields.flag("maintainInstanceCount", False) == requirement.usage.maintain
    same["autoShutdown"] = read_auto_shutdown(fields.fields("autoShutdown")) == requirement.auto_shutdown
    strategy = fields.fields("provisionStrategy")
    if strategy is not None:
        sources = [Fields(each, "sources").get("id") for each in strategy.objects("sources")]
        same["provisionStrategy"] = sources == [requirement.source_id]
    for key, unchanged in same.items():
        if not unchanged:
            raise RefusedError.invalid(
                f"computeRequirement.{key}: the local platform can change targetInstanceCount only"
            )
    target = fields.whole("targetInstanceCount", 0, MAX_NODES)
    if target is None:
        raise RefusedError.invalid("computeRequirement.targetInstanceCount is required")
    call.scheduler.resize_requirement(requirement.id, target, bool(call.flag("reprovision")), call.now)
    call.core.changed()
    return wire.requirement_json(requirement)


async def _transition_requirement(call: Call) -> Any:
    requirement = call.scheduler.transition_requirement(call.path("id"), call.path("status"), call.now)
    call.core.changed()
    return wire.requirement_json(requirement)


async def _auto_shutdown(call: Call) -> Any:
    value = await call.body()
    wish = read_auto_shutdown(None if value is None else Fields(value, "autoShutdown"), needs_timeout=True)
    requirement = call.scheduler.set_auto_shutdown(call.path("id"), wish, call.now)
    call.core.changed()
    return wire.requirement_json(requirement)


async def _updating(call: Call) -> Any:
    return call.scheduler.requirement(call.path("id")).status in ("PROVISIONING", "TERMINATING")


async def _requirement_updates(call: Call) -> Any:
    requirement = call.scheduler.requirement(call.path("id"))
    return stream(call.core, lambda: (wire.requirement_json(requirement), requirement.status == "TERMINATED"))


async def _end_instances(call: Call, deprovision: bool) -> None:
    value = await call.body()
    if not isinstance(value, list):
        raise RefusedError.invalid("The request body must be a list of instance ids")
    ids = []
    for number, each in enumerate(value):
        fields = Fields(each, f"instanceIds[{number}]")
        fields.ignore("sourceId")
        ids.append(fields.need("instanceId"))
    call.scheduler.end_instances(call.path("id"), ids, deprovision, call.now)
    call.core.changed()


async def _deprovision(call: Call) -> Any:
    await _end_instances(call, deprovision=True)


async def _transition_instances(call: Call) -> Any:
    status = call.path("status")
    if status != "TERMINATED":
        raise RefusedError.invalid(f"the local platform cannot stop and start machines ({status} refused)")
    await _end_instances(call, deprovision=False)


async def _instances(call: Call) -> Any:
    requirement_id, source = call.query("computeRequirementId"), call.query("computeSourceId")
    providers, regions = call.words("providers", PROVIDERS), call.queries("regions")
    statuses, images = call.words("statuses", INSTANCE_STATUSES), call.queries("imageIds")
    private, public = call.query("privateIpAddress"), call.query("publicIpAddress")
    hostname = call.query("hostname")
    scheduler = call.scheduler
    instances = (
        scheduler.instances if requirement_id is None else scheduler.requirement(requirement_id).instances
    )

    def wanted(instance: Instance) -> bool:
        template = instance.requirement.template
        return (
            source in (None, instance.requirement.source_id)
            and (not providers or template.provider in providers)
            and (not regions or template.region in regions)
            and (not statuses or instance.status in statuses)
            and (not images or (instance.requirement.usage.images_id or "local") in images)
            and private in (None, instance.private_ip)
            and public in (None, instance.public_ip)
            and hostname in (None, instance.hostname)
        )

    return call.slice(instances.values(), wanted, wire.instance_json, SORT_INSTANCES)


def _of_kind(kinds: Collection[str], kind: str) -> bool:
    """Say whether a kind is among those asked for, which may be named without their package; none is all."""
    return not kinds or kind in kinds or kind.rpartition(".")[2] in kinds


async def _templates(call: Call) -> Any:
    named, kinds, strategies = call.named(), call.queries("type"), call.queries("strategyType")

    def wanted(template: Template) -> bool:
        line = wire.template_summary(template)
        return (
            named(template.namespace, template.name)
            and _of_kind(kinds, line["type"])
            and _of_kind(strategies, line["strategyType"])
        )

    templates = call.scheduler.templates.values()
    return call.slice(templates, wanted, wire.template_summary, SORT_TEMPLATES, bare=True)


async def _template(call: Call) -> Any:
    return wire.template_json(call.scheduler.template(call.path("id")))


async def _template_named(call: Call) -> Any:
    return wire.template_json(call.scheduler.template(f"{call.path('namespace')}/{call.path('name')}"))


async def _sources(call: Call) -> Any:
    named, kinds = call.named(), call.queries("sourceTypes", "sourceType")

    def wanted(template: Template) -> bool:
        kind = wire.source_template_summary(template)["sourceType"]
        return named(template.namespace, template.name) and _of_kind(kinds, kind)

    templates = call.scheduler.templates.values()
    return call.slice(templates, wanted, wire.source_template_summary, SORT_SOURCES, bare=True)


async def _source(call: Call) -> Any:
    reference = call.path("id").replace(":cst:", ":crt:")
    return wire.source_template_json(call.scheduler.template(reference))


async def _source_named(call: Call) -> Any:
    return wire.source_template_json(call.scheduler.template(f"{call.path('namespace')}/{call.path('name')}"))


ROUTES: Mapping[tuple[str, str], Action] = {
    ("POST", "/compute/templates/provision"): _provision,
    ("GET", "/compute/requirements"): _requirements,
    ("PUT", "/compute/requirements"): _update_requirement,
    ("GET", "/compute/requirements/{id}"): _requirement,
    ("GET", "/compute/namespaces/{namespace}/requirements/{name}"): _requirement_named,
    ("PUT", "/compute/requirements/{id}/transition/{status}"): _transition_requirement,
    ("PUT", "/compute/requirements/{id}/autoShutdown"): _auto_shutdown,
    ("GET", "/compute/requirements/{id}/updating"): _updating,
    ("GET", "/compute/requirements/{id}/updates"): _requirement_updates,
    ("PUT", "/compute/requirements/{id}/instances/deprovision"): _deprovision,
    ("PUT", "/compute/requirements/{id}/instances/transition/{status}"): _transition_instances,
    ("GET", "/compute/instances"): _instances,
    ("GET", "/compute/templates/requirements"): _templates,
    ("GET", "/compute/templates/requirements/{id}"): _template,
    ("GET", "/compute/namespaces/{namespace}/templates/requirements/{name}"): _template_named,
    ("GET", "/compute/templates/sources"): _sources,
    ("GET", "/compute/templates/sources/{id}"): _source,
    ("GET", "/compute/namespaces/{namespace}/templates/sources/{name}"): _source_named,
}
