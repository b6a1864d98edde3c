"""The command line: `run`, `replay`, `trace`, `index`, `mcp`, `bench`, `doctor`. Each imports what it needs when it is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from thinkloop.agent import tool_options as opt
from thinkloop.agent.tool_options import option
from thinkloop.traces.events import ThinkloopError
from typer.core import TyperGroup

INTERRUPTED = 130


class Commands(TyperGroup):
    """Errors meant for people become one paragraph and exit code 1, Ctrl-C 130. `--debug` lets tracebacks through."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ThinkloopError as error:
            if ctx.meta.get("debug"):
                raise
            complain(error)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("\nInterrupted.", err=True)
            raise typer.Exit(INTERRUPTED) from None


def complain(error: ThinkloopError) -> None:
    """The error as a paragraph on standard error, with nothing in it that a terminal would obey."""
    from thinkloop.agent.plain import clean

    typer.echo(f"Error: {clean(str(error))}", err=True)


def _debug(ctx: typer.Context, value: bool) -> bool:
    ctx.meta["debug"] = value or ctx.meta.get("debug", False)
    return value


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(version("thinkloop"))
        raise typer.Exit


app = typer.Typer(
    cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Runs an open-weight thinking model and its tools in one process, every step recorded and replayable.",
)  # fmt: skip
trace_app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, help="Look at recorded runs."
)
app.add_typer(trace_app, name="trace")

Debug = Annotated[bool, typer.Option("--debug", callback=_debug, is_eager=True, help="Show tracebacks.")]
TraceArgument = Annotated[Path, typer.Argument(metavar="TRACE", help="Folder of a recorded run.")]


@app.callback()
def thinkloop(
    ctx: typer.Context,
    debug: Debug = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand == "run":
        from thinkloop.agent.settings import read_settings

        ctx.default_map = {"run": read_settings(RUN_OPTIONS)}


@app.command()
def run(
    ctx: typer.Context,
    task: Annotated[
        str | None,
        typer.Argument(
            metavar="TASK", help='What to find out; "-" reads standard input.', show_default="the demo question"
        ),
    ] = None,
    model: Annotated[
        str, option("model", '"mini", a checkpoint folder, or the URL of an OpenAI-compatible server.')
    ] = "mini",
    model_name: Annotated[str | None, option("model-name", "The model's name on the server.")] = None,
    tools: opt.Tools = "search,open,python",
    corpus: opt.CorpusFolders = None,
    engine: opt.IndexEngine = "sqlite",
    web: opt.Web = None,
    pages: opt.PagesBy = None,
    file: opt.Files = None,
    keep: opt.Keep = None,
    allow_host: opt.AllowHost = None,
    unsafe_python: opt.UnsafePython = False,
    mcp: opt.Servers = None,
    max_steps: Annotated[int, option("max-steps", "Most model turns.", min=1)] = 300,
    max_thinking: Annotated[int | None, option("max-thinking", "Most thinking tokens a step.", min=1)] = None,
    thinking_budget: Annotated[
        int | None, option("thinking-budget", "Most thinking tokens over the run.", min=1)
    ] = None,
    max_tokens: Annotated[int | None, option("max-tokens", "Most tokens written over the run.", min=1)] = None,
    time_limit: Annotated[float | None, option("time-limit", "Seconds for the run.", min=0.001)] = None,
    seed: Annotated[
        int | None, option("seed", "Seed of the sampling.", min=0, show_default="0, a server's own")
    ] = None,
    temperature: Annotated[
        float | None, option("temperature", "0 is greedy.", min=0.0, show_default="the model's own")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], option("device", "Where a model in this process runs.")] = "cpu",
    kv_dtype: Annotated[
        Literal["bf16", "fp8"], option("kv-dtype", "What its cache holds; fp8 takes 0.57 of bf16 (cuda only).")
    ] = "bf16",
    context: Annotated[
        int | None, option("context", "Most tokens of its window.", min=1, show_default="the model's own")
    ] = None,
    grammar: Annotated[
        bool, option("grammar/--no-grammar", "Write calls under a grammar (needs the grammar extra).")
    ] = True,
    trace: Annotated[Path | None, option("trace", "New folder for the record.", show_default="under runs/")] = None,
    json: Annotated[bool, option("json", "Print events as JSON lines.")] = False,
    quiet: Annotated[bool, option("quiet", "Print the answer alone.")] = False,
    debug: Debug = False,
) -> None:
    """Let the model work on a task until it has an answer, or a limit makes it give one.

    Options can also stand in thinkloop.toml (`max-steps = 40`) or in THINKLOOP_* variables; the command line wins over
    the environment, the environment over the file. Exit codes: 0 answered, 1 error, 2 usage, 130 interrupted.
    """
    from thinkloop.agent.run_command import Request, execute
    from thinkloop.agent.settings import read_servers
    from thinkloop.agent.toolsets import ToolRequest

    if json and quiet:
        raise typer.BadParameter("--json and --quiet exclude each other")
    offered = ToolRequest(
        tools=opt.names(tools), corpus=tuple(corpus or ()), engine=engine, web=opt.listed(web), pages=pages,
        files=tuple(file or ()), keep=keep, allow_hosts=tuple(allow_host or ()), unsafe_python=unsafe_python,
        servers=tuple(mcp or ()), server_tables=read_servers(),
    )  # fmt: skip
    request = Request(
        task=task, model=model, model_name=model_name, tools=offered, max_steps=max_steps,
        max_thinking=max_thinking, thinking_budget=thinking_budget, max_tokens=max_tokens,
        time_limit=time_limit, seed=seed, temperature=temperature, device=device, kv_dtype=kv_dtype,
        context=context, grammar=grammar, trace=trace, output="json" if json else "quiet" if quiet else "screen",
    )  # fmt: skip
    raise typer.Exit(execute(request))


RUN_OPTIONS = frozenset({
    "model", "model_name", "tools", "corpus", "engine", "web", "pages", "file", "keep", "allow_host", "max_steps",
    "max_thinking", "thinking_budget", "max_tokens", "time_limit", "seed",
    "temperature", "device", "kv_dtype", "context", "grammar", "trace", "json", "quiet", "debug",
})  # fmt: skip


@app.command()
def replay(
    trace: TraceArgument,
    speed: Annotated[
        float | None,
        typer.Option("--speed", min=0.01, help="Times as fast as recorded.", show_default="1 on a terminal"),
    ] = None,
    instant: Annotated[
        bool, typer.Option("--instant", help="Show all at once (the default where there is no terminal).")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print events as JSON lines.")] = False,
    debug: Debug = False,
) -> None:
    """Show a run again, from its record alone."""
    from thinkloop.agent.output import print_json, screen_for
    from thinkloop.agent.replay import Player
    from thinkloop.traces.reader import TraceReader

    if speed is None and not instant and not json and sys.stdout.isatty():
        speed = 1.0
    player = Player(TraceReader.open(trace), speed=None if instant else speed)
    if json:
        for event in player.events():
            print_json(event)
        return
    with screen_for(str(trace), now=player.now) as screen:
        for event in player.events():
            screen.show(event)


@trace_app.command("show")
def trace_show(
    trace: TraceArgument,
    step: Annotated[int | None, typer.Option("--step", min=1, help="Only this step, with results in full.")] = None,
    debug: Debug = False,
) -> None:
    """Print a run as a transcript, with token counts and times per step."""
    from thinkloop.agent.output import show_trace

    show_trace(trace, step)


@trace_app.command("files")
def trace_files(
    trace: TraceArgument,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder to write them to.")] = Path("files"),
    debug: Debug = False,
) -> None:
    """Write out the files that came with results: figures, screenshots, pages, what python wrote."""
    from thinkloop.agent.output import save_files

    save_files(trace, to)


@trace_app.command("ls")
def trace_ls(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that holds traces.")] = Path("runs"),
    debug: Debug = False,
) -> None:
    """List the recorded runs below a folder."""
    from thinkloop.agent.output import list_traces

    list_traces(folder)


@app.command()
def trust(debug: Debug = False) -> None:
    """Allow the thinkloop.toml of this folder, as it stands, to run programs and to reach outside.

    It prints what the file asks for. After a change it has to be trusted again.
    """
    from thinkloop.agent.plain import clean
    from thinkloop.agent.settings import trust_settings

    asked = trust_settings()
    for wish in asked or ["do nothing that needs trust"]:
        typer.echo(f"thinkloop.toml may {clean(wish)}")


@app.command()
def index(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of texts.")],
    engine: opt.IndexEngine = "sqlite",
    debug: Debug = False,
) -> None:
    """Read a folder of texts into its search index, so that a later `run --corpus DIR` starts at once.

    Only files that are new or changed are read again. A run does the same by itself.
    """
    from thinkloop.agent.index_command import execute

    execute(folder, engine)


@app.command()
def mcp(
    tools: opt.Tools = "search,open,python",
    corpus: opt.CorpusFolders = None,
    engine: opt.IndexEngine = "sqlite",
    web: opt.Web = None,
    pages: opt.PagesBy = None,
    file: opt.Files = None,
    keep: opt.Keep = None,
    allow_host: opt.AllowHost = None,
    unsafe_python: opt.UnsafePython = False,
    http: Annotated[
        int | None, typer.Option("--http", min=0, max=65535, help="Port on 127.0.0.1.", show_default="stdio")
    ] = None,
    debug: Debug = False,
) -> None:
    """Offer thinkloop's tools to another program, as an MCP server over standard input and output."""
    from thinkloop.agent.serve_tools import execute
    from thinkloop.agent.toolsets import ToolRequest

    offered = ToolRequest(
        tools=opt.names(tools), corpus=tuple(corpus or ()), engine=engine, web=opt.listed(web), pages=pages,
        files=tuple(file or ()), keep=keep, allow_hosts=tuple(allow_host or ()), unsafe_python=unsafe_python,
    )  # fmt: skip
    execute(offered, http)


@app.command()
def bench(
    what: Annotated[Literal["decode", "prefill", "load", "kernels"], typer.Argument(help="What to measure.")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help='"mini", a checkpoint folder, or made up of random weights: "moonlight", "moonlight-slice", "k2-slice",'
            ' each with "-bf16" for experts that aren\'t INT4.',
        ),
    ] = "mini",
    device: Annotated[Literal["cpu", "cuda"], typer.Option("--device", help="Where it runs.")] = "cpu",
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="Tokens a round.", show_default="128 or 16; prefill 512")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often to measure.")] = 5,
    part: Annotated[
        list[str] | None, typer.Option("--part", help="Which kernels; may be given again.", show_default="all")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Measure how fast a model decodes, prefills or loads here, or each kernel is, beside what the machine can do.

    Decoding is held against the speed at which memory can be read, prefilling against a large matrix product, both
    measured between the rounds. tokens/s is the best round, all other figures are the median's.
    """
    from thinkloop.agent.bench_command import Request, execute

    parts = tuple(part or ())
    execute(Request(what=what, model=model, device=device, tokens=tokens, rounds=rounds, parts=parts, json=json))


@app.command()
def doctor(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="A checkpoint folder to look at.", show_default="this machine")
    ] = None,
    debug: Debug = False,
) -> None:
    """Check what a run needs, and say how to mend what is missing.

    Of a checkpoint folder: what it is, whether it is whole, how much memory it takes and where it fits.
    """
    from thinkloop.agent.doctor import examine

    missing = 0
    for finding in examine(checkpoint):
        typer.echo(f"{_MARKS[finding.state]}  {finding.name:<11} {finding.detail}")
        if finding.fix:
            typer.echo(f"   {'':<11} -> {finding.fix}")
        missing += finding.state == "missing"
    raise typer.Exit(1 if missing else 0)


_MARKS = {"ok": "ok", "warn": "! ", "missing": "NO"}
