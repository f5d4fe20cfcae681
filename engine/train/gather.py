"""From single processes to the ranks of a run and back: the store, the watch, the process group, the mesh, the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.comm.heart import Heart, Phase
from engine.errors import UserError
from engine.mesh import Mesh, build_mesh
from engine.train.job import Job
from engine.train.launch import Diverged, ended
from engine.train.place import Place
from engine.train.rendezvous import Reported, connect, start_group
from engine.train.same_run import refuse_another_run
from engine.train.threads import cores_here, threads_of
from engine.train.watch import Limits, Watch


@contextmanager
def gathered(job: Job, place: Place, before: Callable[[], None] = lambda: None) -> Iterator[Mesh]:
    """The mesh of this rank, under the watch from before the process group exists until all ranks have come to the end.

    `before` runs on every rank once it is watched and known to be of this run. What is raised here, there or inside is
    told to the other ranks, which then end, and raised on: what all find as `Ended`, a crash under `Reported`.
    """
    threads = threads_of(place, os.environ, cores_here())
    if threads is not None:
        torch.set_num_threads(threads)
    limits = Limits(job.config.runtime.timeout, job.config.runtime.save_timeout)
    if place.world == 1:
        before()
        yield _mesh(job, limits, place, None, Heart())
        return
    store = connect(place, limits.peers)  # a taken port is known before anything is written
    watch = Watch(connect(place, limits.peers, open_store=False), place.rank, place.world, limits,
                  served="torchrun's agent" if place.agent else "rank 0",
                  serves=place.rank == 0 and not place.agent)
    watch.start()
    store.set_timeout(timedelta(seconds=limits.last))
    try:
        with watch.heart.waits():
            refuse_another_run(job.config, job.data, place.rank, place.world, store, job.start.content())
        before()
        with watch.heart.waits():
            mesh = _mesh(job, limits, place, store, watch.heart)
        watch.label = str(mesh)
        watch.heart.enter(Phase.START)
        yield mesh
        watch.heart.enter(Phase.END)
        with watch.heart.waits():
            dist.barrier()
    except (UserError, Diverged) as error:  # all ranks find the same, or are told: the run ends in order
        watch.stop()
        raise ended(watch.store, place, error) from error
    except BaseException as error:
        watch.report(error)
        if isinstance(error, Exception):
            raise Reported from error
        raise
    watch.stop()
    dist.destroy_process_group()


def _mesh(job: Job, limits: Limits, place: Place, store: dist.Store | None, heart: Heart) -> Mesh:
    start_group(place, job.device, limits.last, store)
    model, parallel = job.config.model, job.config.parallel
    return build_mesh(job.layout, place.rank, model.kv_heads, timedelta(seconds=limits.last), tied=model.tied,
                      wraps=parallel.virtual_stages > 1, heart=heart)
