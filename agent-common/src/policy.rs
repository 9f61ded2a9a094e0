//! What a pod's connections get, as the kernel reads it.

/// `PodPolicy::imds`: connections to the instance metadata service are left alone.
pub const IMDS_OFF: u32 = 0;
/// `PodPolicy::imds`: left alone, but counted.
pub const IMDS_AUDIT: u32 = 1;
/// `PodPolicy::imds`: redirected to the agent.
pub const IMDS_INTERCEPT: u32 = 2;
/// `PodPolicy::imds`: refused with `EPERM`.
pub const IMDS_DENY: u32 = 3;

/// `PodPolicy::pod_identity`: connections to 169.254.170.23, `fd00:ec2::23` and 169.254.170.2 are left alone.
pub const POD_IDENTITY_OFF: u32 = 0;
/// `PodPolicy::pod_identity`: redirected to the agent.
pub const POD_IDENTITY_ON: u32 = 1;

/// A quality-of-service class whose pods have a cgroup between them and kubepods; as a number, its slot in `QOS_CLASSES`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum QosClass {
    /// Some container requests or limits something.
    Burstable = 0,
    /// None does.
    BestEffort = 1,
}

/// Slot of `UNKNOWN_POD` for connections through a socket in a pod's own network.
pub const UNKNOWN_IN_POD_NETWORK: u32 = 0;
/// Slot of `UNKNOWN_POD` for connections through a socket in the host's network namespace.
pub const UNKNOWN_ON_HOST_NETWORK: u32 = 1;

/// The policy of one pod. A value that is none of the constants counts as the strictest.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodPolicy {
    /// One of the `IMDS_*` constants.
    pub imds: u32,
    /// One of the `POD_IDENTITY_*` constants.
    pub pod_identity: u32,
}

impl PodPolicy {
    /// Nothing of the pod is touched: of podgate's own, of the EKS Pod Identity Agent's, and, where no annotation asks for
    /// more, of one that is not known yet and connects through the host's network.
    pub const EXEMPT: Self = Self { imds: IMDS_OFF, pod_identity: POD_IDENTITY_OFF };
}

// SAFETY: `repr(C)`, no padding (asserted in `abi`), every bit pattern is valid.
#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya writes the record to a map as bytes")]
unsafe impl aya::Pod for PodPolicy {}
