//! What the program on outgoing packets is to do.

/// A bit of `EGRESS_JOBS`: pods in `intercept` and `deny` send nothing to IMDS or the target but what `connect` has let
/// through.
pub const JOB_GUARD: u32 = 1;
/// A bit of `EGRESS_JOBS`: what pods in `audit` ask IMDS for is told.
pub const JOB_AUDIT_PATHS: u32 = 1 << 1;
