"""What every part rests on: commands, devices, the processes of a job, XLA, files, errors."""
