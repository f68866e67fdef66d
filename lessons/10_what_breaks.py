import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="10. What breaks")

with app.setup:
    import tempfile
    from pathlib import Path

    import lesson
    import marimo as mo
    from lesson import Measured, Question, run


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 10. What breaks

    Long runs on many machines meet everything that can go wrong. This lesson breaks runs on
    purpose, in four ways, and you predict what happens:

    * a rank stays away from a collective;
    * the learning rate is far too high;
    * a rank is killed, and the run is started again;
    * a plan cannot work.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## What to know

    * A collective (such as an all-reduce) ends when **all** ranks have come to it. A rank that is
      missing stops the others.
    * A gradient that is not a number makes all weights not a number, with one update.
    * A checkpoint is what a run can go on from. This run writes one every 5 steps; `resume=auto`
      goes on from the newest.
    * The model `tiny` has 4 heads. Tensor parallelism gives each rank whole heads.
    """)
    return


@app.cell(hide_code=True)
def asked():
    questions = (
        Question(
            "hang",
            "Rank 1 stays away from a collective in step 3. What does dtrain do?",
            answer="it names the missing rank, and ends",
            choices=(
                "it goes on without rank 1",
                "it waits until somebody stops it",
                "it names the missing rank, and ends",
            ),
            hint="Half of `launch.timeout_s` after the ranks began to wait, somebody looks who is "
            "there.",
            because="A watch on each rank tells the others where it is. So a hang has a name: "
            "rank, step, axis and collective.",
        ),
        Question(
            "nan",
            "The learning rate is a million. Which step is the first whose loss is no number?",
            answer=2,
            tolerance=0,
            hint="The loss of a step is computed before the weights change.",
            because="Step 1 has the first weights, and its update spoils them. dtrain ends the "
            "run before the update of step 2, so that no checkpoint holds such weights.",
        ),
        Question(
            "resumed",
            "Checkpoints are written every 5 steps, and a rank is killed after step 12. Which "
            "step does the next start train first?",
            answer=11,
            tolerance=0,
            hint="Which is the newest checkpoint, and what is the step after it?",
            because="The newest checkpoint is that of step 10. Steps 11 and 12 are trained again; "
            "on the same number of ranks they give the same losses.",
        ),
        Question(
            "refused",
            "What happens to `strategy=tensor` on 3 ranks with a model of 4 heads?",
            answer="one line, status 2, no step",
            choices=(
                "it trains; one rank has two heads",
                "a traceback in the first matrix product",
                "one line, status 2, no step",
            ),
            hint="4 is not divisible by 3, and that is known before there is any process.",
            because="What cannot work is refused before the ranks talk, with the numbers and a "
            "remedy.",
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
    hang = run(
        "+experiment=hang", "strategy=fsdp", "launch.nproc=2", "launch.timeout_s=8", fails=True
    )
    nan = run("optimizer.lr=1e6", "lr_schedule.warmup_steps=0", "profile=false", fails=True)
    fifteen = ("strategy=ddp", "launch.nproc=2", "steps=15", "profile=false")
    saving = (*fifteen, "checkpoint.every=5")
    with tempfile.TemporaryDirectory(prefix="lesson-") as _place:
        _folder = Path(_place) / "run"
        # a slow rank, so that there is time to kill one after step 12
        killed = lesson.run_and_kill(
            *saving,
            "inject.straggler.rank=1",
            "inject.straggler.factor=30",
            folder=_folder,
            rank=1,
            step=12,
        )
        resumed = run(*saving, "resume=auto", folder=_folder)
    unbroken = run(*fifteen)
    refused = run("strategy=tensor", "launch.nproc=3", fails=True)
    lesson.commands(hang, nan, killed, resumed, unbroken, refused)
    return given, hang, killed, nan, refused, resumed, unbroken


@app.cell
def judged(given, hang, killed, nan, questions, refused, resumed, unbroken):
    verdicts = lesson.judge(
        "10_what_breaks",
        questions,
        given,
        {
            "hang": Measured(
                "it names the missing rank, and ends"
                if any("rank 1 is missing" in line for line in hang.said)
                else "it goes on without rank 1"
            ),
            "nan": Measured(nan.steps_printed[-1] + 1),
            "resumed": Measured(resumed.steps_printed[0]),
            "refused": Measured(
                "one line, status 2, no step"
                if (refused.status, len(refused.said), refused.steps_printed) == (2, 1, [])
                else "a traceback in the first matrix product"
            ),
        },
    )
    lesson.show(verdicts)
    return (verdicts,)


@app.cell(hide_code=True)
def _(hang, nan, refused, resumed, unbroken):
    mo.vstack(
        [
            mo.md(
                "What dtrain said:\n\n```\n"
                + "\n".join(line for each in (hang, nan, refused) for line in each.said)
                + "\n```"
            ),
            lesson.curves({"not interrupted": unbroken, "killed and resumed": resumed}),
        ]
    )
    return


@app.cell(hide_code=True)
def _(killed, resumed, unbroken):
    mo.md(f"""
    ## What you see

    The killed run ended with status {killed.status}, after step {len(killed.metrics)}. The next one
    began with step {resumed.steps_printed[0]}, and the curve of all {len(resumed.metrics)} steps
    differs from that of a run that nobody killed by {lesson.apart(unbroken, resumed):.1e}.

    That is possible because a batch is a function of the seed and the step, and a checkpoint has
    the optimizer's states too. `docs/faults.md` lists more faults, and what a run does with each.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Try yourself

    Some of these plans work on 3 ranks, and some are refused. Guess, then ask. (The batch has 6
    rows.)
    """)
    return


@app.cell
def setting():
    option = mo.ui.dropdown(
        ["ddp", "fsdp", "pipeline", "context", "tensor"], value="pipeline", label="strategy"
    )
    again = mo.ui.run_button(label="Run dtrain")
    mo.hstack([option, again], justify="start")
    return again, option


@app.cell
def tried(again, option):
    mo.stop(not again.value)
    _words = (f"strategy={option.value}", "launch.nproc=3", "global_batch_size=6", "profile=false")
    _own = run(*_words, fails=None)
    mo.md(
        f"Status {_own.status}.\n\n```\n"
        + "\n".join(_own.said or _own.printed.splitlines()[-2:])
        + f"\n```\n\n```sh\n{_own.command}\n```"
    )
    return


@app.cell
def scored(verdicts):
    lesson.score(verdicts)
    return


if __name__ == "__main__":
    app.run()
