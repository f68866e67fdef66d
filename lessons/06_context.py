import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="6. Context parallel")

with app.setup:
    import lesson
    import marimo as mo
    from lesson import KIB, Measured, Question, run


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 6. Context parallel

    When a sequence is too long for one rank, divide its tokens. All layers but one work on each
    token by itself. Attention alone needs the keys and values of other tokens, and there are two
    ways to get them:

    * **ring**: each rank keeps its queries, and keys and values go round;
    * **Ulysses**: an all-to-all swaps tokens for heads, so that each rank has all tokens of its
      heads, and another one swaps back.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## What travels

    Let $S$ be the bytes of a rank's queries in a block: rows × its tokens × width × 4. Here that is
    4 × 32 × 64 × 4 bytes, 32 KiB, on two ranks with rows of 64 tokens. Keys and values have as many
    each.

    * A ring sends $2(n-1)S$ forward. Backward it sends keys and values once more, and their
      gradients all the way round: $2(2n-1)S$. Together $2(3n-2)S$ a block.
    * Ulysses sends $4S\frac{n-1}{n}$ forward (queries, keys, values and the result), and as much
      backward.

    The model has 2 blocks. Both also all-reduce gradients, as `ddp` does.
    """)
    return


@app.cell(hide_code=True)
def asked():
    questions = (
        Question(
            "activations",
            "What share of one process's activations does each of two ranks hold?",
            answer=0.5,
            hint="Activations belong to tokens, and tokens are divided.",
            because="Tokens are divided, so activations are. Parameters are not.",
        ),
        Question(
            "ring",
            "How much does each of two ranks send round the ring in a step?",
            answer=2 * (3 * 2 - 2) * lesson.BLOCKS * lesson.ROWS * 32 * lesson.WIDTH * 4 / KIB,
            unit="KiB",
            hint=r"$2(3n-2)S$ a block with $n = 2$ and $S$ = 32 KiB, and 2 blocks.",
            because="It is 8 S a block: 2 forward, 6 backward.",
        ),
        Question(
            "twice",
            "The rows get 64 tokens instead of 32. By what factor do these bytes grow?",
            answer=2,
            hint="Each token has one key and one value.",
            because="Bytes grow with the tokens, the work of attention with their square. So the "
            "longer the rows are, the better a ring hides its messages behind computing.",
        ),
        Question(
            "ulysses",
            "What share of the ring's bytes does Ulysses send?",
            answer=0.5,
            hint=r"$2 \cdot 4 S (n-1)/n$ against $2(3n-2)S$, with $n = 2$.",
            because="It is 4 S against 8 S, on two ranks. With more ranks Ulysses gains more, but "
            "it needs a head for each rank.",
        ),
    )
    form = lesson.ask(questions)
    mo.vstack([form])
    return form, questions


@app.cell(hide_code=True)
def _(questions):
    lesson.hints(questions)
    return


@app.cell
def trained(form, questions):
    given = lesson.predictions(questions, form)
    one = run("strategy=single")
    ring = run("strategy=context", "launch.nproc=2")
    short = run("strategy=context", "launch.nproc=2", "seq_len=32")
    ulysses = run("strategy=context", "launch.nproc=2", "strategy.cp.method=ulysses")
    lesson.commands(one, ring, short, ulysses)
    return given, one, ring, short, ulysses


@app.cell
def judged(given, one, questions, ring, short, ulysses):
    verdicts = lesson.judge(
        "06_context",
        questions,
        given,
        {
            "activations": Measured(
                ring.held("activations") / one.held("activations"),
                ring.held("activations", predicted=True) / one.held("activations", predicted=True),
            ),
            "ring": Measured(
                ring.sent(what="send") / KIB, ring.sent(what="send", predicted=True) / KIB
            ),
            "twice": Measured(
                ring.sent(what="send") / short.sent(what="send"),
                ring.sent(what="send", predicted=True) / short.sent(what="send", predicted=True),
            ),
            "ulysses": Measured(
                ulysses.sent(what="all_to_all") / ring.sent(what="send"),
                ulysses.sent(what="all_to_all", predicted=True)
                / ring.sent(what="send", predicted=True),
            ),
        },
    )
    lesson.show(verdicts)
    return (verdicts,)


@app.cell(hide_code=True)
def _(one, ring, ulysses):
    _runs = {"one process": one, "ring": ring, "Ulysses": ulysses}
    mo.vstack([lesson.bars(_runs), lesson.curves(_runs)])
    return


@app.cell(hide_code=True)
def _(one, ring, ulysses):
    mo.md(f"""
    ## What you see

    The curves are equal: a ring differs from one process by {lesson.apart(one, ring):.1e}, Ulysses
    by {lesson.apart(one, ulysses):.1e}. Exact attention can be computed in parts, since the parts
    of a softmax can be merged.

    Under a causal mask a late token looks at more keys than an early one. If rank 0 had the first
    half of the tokens it would have a third of rank 1's work. So each rank gets an early and a late
    chunk.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Try yourself

    `strategy.cp.balanced=false` gives each rank one chunk. The bytes stay. Look at the computing
    time of both ranks; with rows as short as these, the difference may drown in noise.
    """)
    return


@app.cell
def setting():
    option = mo.ui.dropdown(["true", "false"], value="false", label="strategy.cp.balanced")
    again = mo.ui.run_button(label="Run dtrain")
    mo.hstack([option, again], justify="start")
    return again, option


@app.cell
def tried(again, option):
    mo.stop(not again.value)
    _own = run("strategy=context", "launch.nproc=2", f"strategy.cp.balanced={option.value}")
    _times = [1000 * each["time"]["compute"] for each in _own.summary["profile"]["ranks"]]
    mo.md(
        f"Each rank sends {_own.sent(what='send') / KIB:,.0f} KiB round the ring. The ranks "
        f"computed for {_times[0]:.1f} and {_times[1]:.1f} ms in a "
        f"step.\n\n```sh\n{_own.command}\n```"
    )
    return


@app.cell
def scored(verdicts):
    lesson.score(verdicts)
    return


if __name__ == "__main__":
    app.run()
