"""`allstep rehearse`: a script is interrupted here as a cluster would, goes on, and is compared with an unbroken run.

| module | what it does | imports torch |
| --- | --- | --- |
| `rehearsal_request` | what a rehearsal is asked to be, as a value that is checked | no |
| `interruption` | which signals a cluster sends when, and what it starts a job with again; pure | no |
| `iteration_trace` | what each start of the script noted in each iteration, and where two starts part | no |
| `one_start` | one `allstep run` of the script, with signals sent to it | no |
| `rehearsed_script` | the script's process: it runs the script with `script_watch` around it | in the ranks |
| `script_watch` | what stops a script after some iterations and notes what it holds | in the ranks |
| `digests` | digests of what a step depends on: weights, optimizers, schedulers, generators, samples | in the ranks |
| `tensor_comparison` | two checkpoints, tensor by tensor | to compare |
| `probable_causes` | what the traces say about why two runs differ; pure | no |
| `rehearsing` | the course of a rehearsal, from the request to the report | to compare |
| `rehearsal_report` | what came of it, as text and as JSON | no |

The folder of a rehearsal is RUNS/rehearse-SCRIPT-TIME. In it are folders of up to four runs: interrupted, unbroken,
again (the unbroken run a second time) and other-size. Each has the logs of `allstep run`, the checkpoints and the
tracks of the script, which are kept apart from those that the script has elsewhere, and the traces.
"""
