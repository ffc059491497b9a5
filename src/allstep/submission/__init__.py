"""`allstep submit`: a SLURM job that trains, is preempted, requeues itself, and goes on; imports no torch.

| module | what it does |
| --- | --- |
| `request` | the options of `allstep submit`, from a command line or a file |
| `carried_environment` | which variables of the submitting shell the job gets |
| `code_copy` | the code as it was submitted |
| `batch_script` | the text that SLURM is given, a pure function of a `BatchJob` |
| `slurm_commands` | sbatch, squeue and scontrol, and what they say |
| `job_states` | what SLURM's queue and accounting say of jobs |
| `lead_time` | how long before its end a job has to stop, from the time that its saves took |
| `job_record` | the starts of a job, and whether another would get any further |
| `batch_process` | the job's own process: it runs the step, passes notices on, and requeues |

A job's folder is RUNS/NAME:

    job.sh            the batch script
    submission.json   what was submitted from where
    submitted.diff    what differed from the commit
    code/             the files that run
    slurm-JOB.log     what the job prints
    starts.jsonl      each start of the job and how it ended
    saves.jsonl       each committed checkpoint
    run.json          what the run is, and events.jsonl what happened (`allstep.run_record`)
    attempt_K/        the logs of `allstep run`

A member K of an array has starts.jsonl, saves.jsonl and its logs in RUNS/NAME-K.
"""
