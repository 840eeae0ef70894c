"""Launchers: who carries out the runs of a study or a tune, and where.

    supply (what is next)  →  desk  →  local        processes of this machine, over socket pairs
                                    →  remote  →    ray_cluster   tasks of a Ray cluster
                                               →    slurm         arrays of `clplat run FOLDER --variant --seed`

`desk` is what all of them share: the next run, the bar that shows it, how it ended, whether it is begun again. Runs on
other machines work in run folders on a shared disk, and tell of themselves by small files there (`post`).
"""
