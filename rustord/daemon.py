"""The daemon: builds everything from the configuration, serves until it is told to stop, and takes it apart again."""

from __future__ import annotations

import asyncio
import errno
import faulthandler
import gc
import logging
import os
import resource
import signal
import socket
import ssl
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from systemd.journal import JournalHandler

from rustord.admin import Admin
from rustord.config import Config, changes
from rustord.errors import ConfigError, DeviceBusy, DeviceError, PluginError, RustordError, Unavailable
from rustord.event import CONFIG_LOADED, CONFIG_REFUSED, DEVICE_MISSING, FAULT, POOL_CLOSED, POOL_OPENED, POOL_READ_ONLY
from rustord.frontends.exports import Exports
from rustord.frontends.handover import Handover
from rustord.frontends.http import HttpServer, turn_away
from rustord.frontends.nbd import Left, NbdServer, listen_tcp, server_tls
from rustord.frontends.peer import Principals, Roles
from rustord.frontends.workers import Workers
from rustord.hotplug import Hotplug, find_devices
from rustord.layermerger import LayerMerger
from rustord.metrics import Metrics
from rustord.mover import Mover
from rustord.objectstore import ObjectStore
from rustord.objkey import uuid_text
from rustord.plugins import PluginManager
from rustord.pool import open_devices, open_pool
from rustord.repair import Repairer
from rustord.scrub import Scrub
from rustord.supervisor import Supervisor
from rustord.volumes import Volumes
from rustord.wire.api import Role
from rustord.writer import Writer

log = logging.getLogger(__name__)

DRAIN_S = 20.0
"""How long requests under way may take to end once we are told to stop."""
CUT_S = 10.0
"""How long those that are cut off then may take to let go."""
FINISH_S = 60.0
"""How long the Writer may take after that: it erases what has been deleted."""
NBD_SOCKET = "rustord-nbd.socket"
"""The unit whose socket is that of NBD; any other is that of the object API."""
_QUEUE_LENGTH_MAX = 4096
"""The longest queue of a socket (net.core.somaxconn), unless somebody has made it longer."""
LOOK_AGAIN_S = 5.0
"""When the devices are looked at again if that failed."""
REFUSED_S = 60.0
"""When a device of the pool that was refused is looked at again: what was in the way may be over."""
STUCK_S = 60.0
"""A writer that has not got on for longer than this is no sign of life: the watchdog may restart us."""


def run(configure: Callable[[], Config]) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP calls ``configure`` once more and applies what can be applied.

    Raises RustordError for whatever keeps the daemon from starting.
    """
    # Signals that come too early wait until the event loop takes them; all other threads inherit that they do not.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    _allow_descriptors()
    with closing(Supervisor()) as supervisor, _passed_sockets(supervisor) as passed:
        config = configure()
        set_up_logging(config)
        store, plugins = _open(config, supervisor)
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})  # who sees us listen may send one
            with listen(config, supervisor, passed) as listeners:
                gc.collect()
                gc.freeze()  # what is there by now stays: to look through it stops everything for 10 ms each time
                asyncio.run(_serve(config, configure, store, plugins, listeners, supervisor))
        finally:
            supervisor.status("closing the pool")
            store.close()
            log.info("the pool is closed", extra=POOL_CLOSED())


def _allow_descriptors() -> None:
    """As many as we may have at all: the usual 1,024 are for programs that call select(2), and we never do."""
    with suppress(OSError, ValueError):  # in a service it has been set already, and a filter keeps us from it
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def _passed_sockets(supervisor: Supervisor) -> Iterator[list[tuple[str, socket.socket]]]:
    """The sockets that systemd passed, and their names.

    After an error, clients wait in their queues until we are started again. If that would be in vain, they are told.
    """
    passed = supervisor.sockets()
    listeners = [(name, sock) for name, sock in passed if not Handover.named(name)]
    try:
        yield passed
    except RustordError as error:
        supervisor.status(f"{error} ({error.hint})")
        if error.needs_person:
            for name, listener in listeners:
                _empty_queue(listener, error, is_http=name != NBD_SOCKET)
        raise
    finally:
        for _, listener in listeners:
            listener.close()


def _empty_queue(listener: socket.socket, error: RustordError, *, is_http: bool) -> None:
    """Turn away who waits, for else systemd would start us again at once, and again."""
    refusal = Unavailable(f"rustord cannot start: {error}", hint=error.hint)
    with suppress(OSError):  # nobody waits any more
        listener.setblocking(False)
        for _ in range(_QUEUE_LENGTH_MAX):
            sock, _ = listener.accept()
            if is_http:
                turn_away(sock, refusal)
            sock.close()


def set_up_logging(config: Config) -> None:
    """Log to the journal, with fields, if systemd started us; else as plain text to standard error."""
    handler: logging.Handler
    if _stderr_is_journal():
        handler = JournalHandler(SYSLOG_IDENTIFIER="rustord")
        handler.setFormatter(logging.Formatter("%(message)s"))  # the fields say the rest
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=config.log.level.upper(), handlers=[handler], force=True)
    if sys.stderr is not None:
        faulthandler.enable()  # the watchdog ends us with SIGABRT: tell where every thread hangs


def _stderr_is_journal() -> bool:
    """See JOURNAL_STREAM in systemd.exec(5)."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # it is closed, or was when we were started
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


def _open(config: Config, supervisor: Supervisor) -> tuple[ObjectStore, PluginManager]:
    plugins = PluginManager(config.plugins, tolerant=True)
    for problem in plugins.problems:
        log.error("%s (%s)", problem, problem.hint)
    # Without a plugin, the pool can be read all the same. To write as was not chosen is not for us to decide.
    read_only = ""
    try:
        keygen = plugins.make("keygen", config.keygen.algorithm, config.keygen.options)
    except PluginError as error:
        read_only = _because(error, plugins)
        keygen = plugins.make("keygen", plugins.offered("keygen")[0])
    try:
        placer = plugins.make("placer", config.placer.policy, config.placer.options)
    except PluginError as error:
        read_only = _because(error, plugins)
        placer = plugins.make("placer", plugins.offered("placer")[0])
    backend = plugins.make("keystore", config.keystore.backend, config.keystore.options)
    began = time.monotonic()

    def progress(text: str) -> None:
        log.info("%s", text)
        supervisor.progress(text)

    store = open_pool(
        open_devices(find_devices(config)),
        keygen=keygen,
        placer=placer,
        backend=backend,
        directory=config.pool.directory,
        erase_policy=config.erase.policy,
        read_only=read_only,
        progress=progress,
    )
    pool = uuid_text(store.label.pool_uuid)
    taken_s = time.monotonic() - began
    log.info("pool %s is open after %.2f s: %d Objects", pool, taken_s, store.stock.count, extra=POOL_OPENED())
    for slot in store.blocks.slots.values():
        if slot.state != "online":
            log.warning("device %d is %s: %s", slot.index, slot.state, slot.reason, extra=DEVICE_MISSING())
    if store.read_only:
        log.error("the pool takes no changes: %s", store.read_only, extra=POOL_READ_ONLY())
    return store, plugins


def _because(error: PluginError, plugins: PluginManager) -> str:
    """Why a role is not filled, and what to install. Raises ``error`` if no plugin is missing that could fill it."""
    if not plugins.problems:
        raise error
    return "; ".join(f"{problem.message} ({problem.hint})" for problem in (error, *plugins.problems))


class Listeners(NamedTuple):
    """The listening sockets: of the object API, and of NBD, which may have one on TCP, too."""

    api: socket.socket
    nbd: socket.socket
    nbd_tcp: socket.socket | None
    tls: ssl.SSLContext | None
    """For that one."""
    left: list[Left]
    """NBD connections that the process before us has left."""


@contextmanager
def listen(config: Config, supervisor: Supervisor, passed: Iterable[tuple[str, socket.socket]]) -> Iterator[Listeners]:
    """The sockets that systemd ``passed``, and new ones at the configured paths for what it did not pass."""
    with ExitStack() as opened:
        api: list[socket.socket] = []
        nbd: list[socket.socket] = []
        left = []
        for name, sock in passed:
            if handover := Handover.named(name):
                left.append((handover, sock))
            else:
                (nbd if name == NBD_SOCKET else api).append(sock)
        for name, listeners in (("rustord.socket", api), (NBD_SOCKET, nbd)):
            if len(listeners) > 1:
                raise ConfigError(f"systemd passed {len(listeners)} sockets", hint=f"{name} has one ListenStream=")
        if not api:
            api.append(opened.enter_context(_bind("socket", config.socket.path, config.socket.mode)))
        if not nbd:
            path = config.nbd.path or config.socket.path.with_name("nbd.sock")
            nbd.append(opened.enter_context(_bind("nbd", path, config.nbd.mode)))
        if nbd[0].family != socket.AF_UNIX:
            raise ConfigError(f"{NBD_SOCKET} is no Unix socket", hint="TCP is for nbd.listen, which knows of TLS")
        tls = server_tls(config.nbd.tls_certificate, config.nbd.tls_key, config.nbd.tls_authority)
        tcp = opened.enter_context(listen_tcp(config.nbd.listen, tls)) if config.nbd.listen else None
        yield Listeners(api[0], nbd[0], tcp, tls, _taken(left, supervisor))


def _taken(left: list[Left], supervisor: Supervisor) -> list[Left]:
    """The same, once nobody else keeps them: a connection that breaks must break for the client, too."""
    try:
        if left:
            supervisor.drop({handover.name for handover, _ in left})
    except OSError as error:
        log.warning("%d connections that were kept are cut: %s", len(left), error)
        for _, sock in left:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        return []
    return left


def _bind(table: str, path: Path, mode: int) -> socket.socket:
    """A new listening socket. ``table`` is where the configuration names its path."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    hint = f"choose another path with {table}.path" + (" or --socket" if table == "socket" else "")
    try:
        _remove_stale(path, hint)
        path.parent.mkdir(parents=True, exist_ok=True)
        previous = os.umask(0o777 & ~mode)
        try:
            listener.bind(str(path))
        finally:
            os.umask(previous)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ConfigError(f"the socket {path} cannot be made: {error.strerror or error}", hint=hint) from error
    except RustordError:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path, hint: str) -> None:
    """Remove a socket on which nobody listens."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} is not a socket", hint=hint)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno not in (errno.ECONNREFUSED, errno.ENOENT):
                raise
            path.unlink(missing_ok=True)
            return
    raise DeviceBusy(f"another daemon listens on {path}", hint=f"stop it, or {hint}")


def roles(config: Config) -> Roles:
    """Who may do what."""
    table = config.roles
    return Roles(Principals.named(table.readers), Principals.named(table.writers), Principals.named(table.admins))


def _give_up() -> NoReturn:
    """End without closing the pool: some thread waits for a device, and an orderly end would wait for the thread."""
    log.critical("a device does not answer; the pool is left as it is, and put in order at the next start")
    logging.shutdown()
    os._exit(DeviceError.exit_status)


async def _serve(
    config: Config,
    reload: Callable[[], Config],
    store: ObjectStore,
    plugins: PluginManager,
    listeners: Listeners,
    supervisor: Supervisor,
) -> None:
    await _Daemon(config, reload, store, plugins, supervisor).serve(listeners)


class _Daemon:
    """The part that lives in the event loop."""

    def __init__(
        self,
        config: Config,
        reload: Callable[[], Config],
        store: ObjectStore,
        plugins: PluginManager,
        supervisor: Supervisor,
    ) -> None:
        self._config = config
        self._reload = reload
        self._store = store
        self._supervisor = supervisor
        self._metrics = Metrics()
        self._writer = Writer(store, self._metrics.on_cycle)
        self._repairer = Repairer(store, self._writer)
        self._scrub = Scrub(store, self._repairer, config.pool.directory / "scrub.json", config.scrub.rate)
        self._volumes = Volumes(store, self._writer, config.pool.directory)
        self._merger = LayerMerger(store, self._volumes)
        exports = Exports(store, self._writer, self._volumes)
        tcp_role = Role[config.nbd.tcp_role.upper()]
        who = roles(config)
        self._nbd = NbdServer(exports, who, config.nbd.limits(), tcp_role, Workers())
        self._mover = Mover(
            store, self._writer, config.mover.rate, config.pool.directory / "mover.json", volumes=self._volumes
        )
        self._admin = Admin(
            store,
            self._writer,
            plugins,
            self._scrub,
            self._volumes,
            self._metrics.text,
            self._nbd.exports,
            mover=self._mover,
        )
        self._server = HttpServer(
            store,
            self._writer,
            self._admin,
            limits=config.limits.of_frontend(),
            roles=who,
            slow_request_s=config.log.slow_request,
        )
        self._metrics.watch(store, self._server.traffic, self._scrub, self._nbd.traffic)
        self._stop = asyncio.Event()
        self._hotplug: Hotplug | None = None
        self._look = asyncio.Event()
        """There may be something to do for ``_hotplug``."""

    async def serve(self, listeners: Listeners) -> None:
        """Serve on ``listeners`` until a signal says stop, then let what is under way end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._apply)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
        following = self._follow_devices()
        self._scrub.resume()
        self._mover.start()
        await asyncio.to_thread(self._merger.start)
        await asyncio.to_thread(self._nbd.resume, listeners.left)
        await self._server.serve(listeners.api)
        await self._nbd.serve(listeners.nbd)
        if listeners.nbd_tcp is not None:
            await self._nbd.serve(listeners.nbd_tcp, listeners.tls)
        log.info("serving on %s", " and ".join(str(listener.getsockname()) for listener in listeners[:2]))
        watchdog = asyncio.create_task(self._watchdog())
        await self._stop.wait()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        watchdog.cancel()
        self._supervisor.stopping("finishing requests")
        log.info("stopping")
        if following is not None:
            self._look.set()
            await asyncio.wait([following], timeout=DRAIN_S)
        try:
            ends = asyncio.gather(self._server.close(DRAIN_S), self._nbd.close(DRAIN_S, leave=self._supervisor.keeps))
            _, left = await asyncio.wait_for(ends, DRAIN_S + CUT_S)
        except TimeoutError:
            _give_up()
        self._volumes.stop()
        await asyncio.to_thread(self._scrub.close)
        await asyncio.to_thread(self._mover.pause)
        await asyncio.to_thread(self._merger.close)
        await asyncio.to_thread(self._volumes.close)
        if not await asyncio.to_thread(self._writer.close, FINISH_S):
            _give_up()
        await asyncio.to_thread(self._hand_over, left)
        with suppress(asyncio.CancelledError):
            await watchdog

    def _hand_over(self, left: list[Left]) -> None:
        """Have connections kept for the next process, if there will be one; the pool has all that they wrote."""
        try:
            if left:
                self._supervisor.keep((handover.name, sock) for handover, sock in left)
        except OSError as error:
            log.warning("open NBD connections cannot be kept: %s", error)
        for _, sock in left:
            sock.close()

    def _follow_devices(self) -> asyncio.Task[None] | None:
        try:
            self._hotplug = Hotplug(self._store, self._writer, self._config)
        except RustordError as error:
            log.warning("%s (%s)", error, error.hint)
            return None
        return asyncio.create_task(self._follow(self._hotplug))

    async def _follow(self, hotplug: Hotplug) -> None:
        """Follow the devices until we stop: at once, and whenever something has happened."""
        loop = asyncio.get_running_loop()
        while not self._stop.is_set():
            self._look.clear()
            try:
                await asyncio.to_thread(hotplug.follow)
            except Exception as error:
                fault = not isinstance(error, TimeoutError)  # which only says that the writer is busy
                extra = FAULT() if fault else None
                log.error("following the devices failed, and is tried again: %r", error, exc_info=fault, extra=extra)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), LOOK_AGAIN_S)
                continue
            loop.add_reader(hotplug, self._look.set)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), REFUSED_S if hotplug.has_refused else None)
            loop.remove_reader(hotplug)
        hotplug.close()

    async def _watchdog(self) -> None:
        """Tell systemd that we are alive: this loop turns, and no cycle hangs."""
        interval_s = min(self._supervisor.watchdog_s / 2, 10.0) or 10.0
        while True:
            self._tell_state()
            await asyncio.sleep(interval_s)

    def _tell_state(self) -> None:
        stuck = self._writer.standstill_s() > STUCK_S
        transfers = self._server.stuck(STUCK_S)
        for where in transfers:
            log.critical("a transfer has not moved for a minute: it is in %s", where)
        if trouble := self._store.keystore.trouble():
            log.critical("the index takes no changes: %s", trouble)
        if self._writer.is_alive() and not stuck and len(transfers) < self._config.limits.transfer_threads:
            self._supervisor.alive(self._admin.summary())
        elif stuck or not self._writer.is_alive():
            problem = f"no change of the pool gets on: the writer is in {self._writer.whereabouts()}"
            log.critical("%s", problem)
            self._supervisor.status(problem)
        else:
            self._supervisor.status("no transfer has moved for a minute")

    def _apply(self) -> None:
        """Read the configuration again, and apply what can be applied."""
        self._supervisor.reloading()
        try:
            config = self._reload()
        except RustordError as error:
            log.error("the configuration stays as it was: %s", error, extra=CONFIG_REFUSED())
        else:
            self._take_over(config)
        self._tell_state()

    def _take_over(self, config: Config) -> None:
        for name, reloadable in changes(self._config, config):
            if reloadable:
                log.info("%s has changed", name)
            else:
                log.warning("%s has changed, and takes effect when rustord is started again", name)
        logging.getLogger().setLevel(config.log.level.upper())
        self._server.roles = self._nbd.roles = roles(config)
        self._server.slow_request_s = config.log.slow_request
        self._scrub.task.bytes_s_max = config.scrub.rate
        self._mover.task.bytes_s_max = config.mover.rate
        self._config = config
        if self._hotplug is not None:
            self._hotplug.config = config
            self._look.set()
        log.info("the configuration was read again", extra=CONFIG_LOADED())
