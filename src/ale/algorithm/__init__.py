"""The mathematics of training: pure functions on arrays, no state, no I/O. Import the module you need by name:

advantages   rewards of a group -> what plays the terminal reward of each trajectory
filters      why a rollout, a trajectory or a group is not trained on
layout       which tokens belong to which chunk of which trajectory
objectives   the losses: IPA, its baselines, supervised and imitation terms (the only module that loads torch)
resampling   where rollouts start inside an expert trajectory, and which chunks carry which loss
returns      discounted chunk returns
"""
