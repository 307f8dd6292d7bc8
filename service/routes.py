"""The routes of files, jobs and models."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, StreamingResponse

from service.files import Files, file_body
from service.jobs import Action, CreateJobBody, Jobs, job_body
from service.keys import Caller
from service.models import Models
from service.progress import Progress, events_body
from service.requests import (
    is_retry,
    list_body,
    list_of,
    metadata_filter,
    page_query,
    parse_body,
    read_body,
)

_MAX_FILES = 10_000


def caller_of(request: Request) -> Caller:
    """Return the project and key of a request, as the middleware has set them."""
    return request.state.caller


def file_router(files: Files) -> APIRouter:
    """Return the routes of /v1/files."""
    router = APIRouter(prefix="/v1/files")

    @router.post("")
    async def create(request: Request) -> dict[str, Any]:
        return file_body(await files.create(caller_of(request), request, is_retry=is_retry(request)))

    @router.get("")
    def listing(request: Request) -> dict[str, Any]:
        query = page_query(request, default=_MAX_FILES, most=_MAX_FILES)
        found = files.slice(caller_of(request).project, query, request.query_params.get("purpose"))
        return list_body(found, query, "file", file_body)

    @router.get("/{file_id}")
    def retrieve(request: Request, file_id: str) -> dict[str, Any]:
        return file_body(files.get(caller_of(request).project, file_id))

    @router.get("/{file_id}/content")
    async def content(request: Request, file_id: str) -> StreamingResponse:
        project = caller_of(request).project
        record = await run_in_threadpool(files.get, project, file_id)
        blocks = files.content(project, record)
        first = await anext(blocks)  # an error after the begin of the response would have no status
        return StreamingResponse(
            _continued(first, blocks),
            media_type="application/octet-stream",
            headers={"Content-Length": str(record["bytes"])},
        )

    @router.delete("/{file_id}")
    def delete(request: Request, file_id: str) -> dict[str, Any]:
        files.delete(caller_of(request).project, file_id, is_retry=is_retry(request))
        return {"id": file_id, "object": "file", "deleted": True}

    return router


async def _continued(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(rest):
        yield first
        async for block in rest:
            yield block


def job_router(jobs: Jobs, progress: Progress) -> APIRouter:
    """Return the routes of /v1/fine_tuning/jobs."""
    # Clients poll the first two: no other route is tried before, no thread waits, and FastAPI does not validate the answer, which would
    # take longer than the rest of such a request.
    router = APIRouter(prefix="/v1/fine_tuning/jobs")

    @router.get("/{job_id}")
    async def retrieve(request: Request, job_id: str) -> JSONResponse:
        project = caller_of(request).project
        return JSONResponse(job_body(await jobs.get(project, job_id), project))

    @router.get("/{job_id}/events")
    async def events(request: Request, job_id: str) -> JSONResponse:
        project, query = caller_of(request).project, page_query(request)
        job, steps = await jobs.get(project, job_id), await progress.shared_steps(project, job_id)
        if query.after is None:
            return JSONResponse(events_body(job, steps, query))
        # All events before the page are passed over: a second for a million.
        return JSONResponse(await run_in_threadpool(events_body, job, steps, query))

    @router.post("")
    async def create(request: Request) -> dict[str, Any]:
        caller = caller_of(request)
        body = parse_body(await read_body(request), CreateJobBody)
        created = await run_in_threadpool(jobs.create, caller, body, is_retry=is_retry(request))
        return job_body(created, caller.project)

    @router.get("")
    def listing(request: Request) -> dict[str, Any]:
        project, query = caller_of(request).project, page_query(request)
        found = jobs.slice(project, query, metadata_filter(request))
        return list_body(found, query, "fine-tuning job", lambda job: job_body(job, project))

    @router.get("/{job_id}/checkpoints")
    async def checkpoints(request: Request, job_id: str) -> dict[str, Any]:
        project, query = caller_of(request).project, page_query(request, default=10)
        job, steps = await jobs.get(project, job_id), await progress.shared_steps(project, job_id)
        return await run_in_threadpool(progress.checkpoints, project, job, steps, query)

    @router.post("/{job_id}/cancel")
    def cancel(request: Request, job_id: str) -> dict[str, Any]:
        return change(request, job_id, "cancel")

    @router.post("/{job_id}/pause")
    def pause(request: Request, job_id: str) -> dict[str, Any]:
        return change(request, job_id, "pause")

    @router.post("/{job_id}/resume")
    def resume(request: Request, job_id: str) -> dict[str, Any]:
        return change(request, job_id, "resume")

    def change(request: Request, job_id: str, action: Action) -> dict[str, Any]:
        project = caller_of(request).project
        changed = jobs.change(project, job_id, action, is_retry=is_retry(request))
        return job_body(changed, project)

    return router


def model_router(models: Models) -> APIRouter:
    """Return the routes of /v1/models."""
    router = APIRouter(prefix="/v1/models")

    @router.get("")
    def listing(request: Request) -> dict[str, Any]:
        return list_of(models.list(caller_of(request).project), has_more=False)

    @router.get("/{model_id:path}")  # ids contain slashes, which the client escapes
    def retrieve(request: Request, model_id: str) -> dict[str, Any]:
        return models.get(model_id, caller_of(request).project)

    @router.delete("/{model_id:path}")
    def delete(request: Request, model_id: str) -> dict[str, Any]:
        models.delete(model_id, caller_of(request).project, is_retry=is_retry(request))
        return {"id": model_id, "object": "model", "deleted": True}

    return router
