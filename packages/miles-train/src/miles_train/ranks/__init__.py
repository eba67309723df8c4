"""What the trainers that are spread over ranks share: messages, how a batch is cut among ranks, a rank's worker, the controller's side."""
