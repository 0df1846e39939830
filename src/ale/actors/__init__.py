"""The actors of a run. Who produces, who consumes, who waits for what:

Generator  takes a slot, asks `envs` for the rollouts of a group, tells finished groups to `buffer`
EnvManager runs episodes, many at once; asks the policy for turns and `reward` for scores
Reward     runs the tests of finished episodes
SampleBuffer holds groups until the trainer takes a batch; refuses what is too old
Trainer    the clock: takes a batch, updates, hands the new weights to the policy, gives the slots back
"""
