//! Where the reconciler's decisions go: the kernel's map of policies.
//!
//! Owns what the control flow may ask of the interceptor; never decides what a pod gets.

use agent_common::policy::{PodPolicy, QosClass};

use crate::intercept::{Error, InterceptorHandle};

/// Where policies go. A trait because only root has the kernel's map.
pub trait PolicyMap: Send + Sync + 'static {
    /// Gives the pod with this cgroup a policy.
    fn set(&self, pod_cgroup_id: u64, policy: PodPolicy) -> impl Future<Output = Result<(), Error>> + Send;
    /// Takes it away, and any exemption.
    fn remove(&self, pod_cgroup_id: u64) -> impl Future<Output = Result<(), Error>> + Send;
    /// Applies no policy to the pod with this cgroup, whatever it has.
    fn exempt(&self, pod_cgroup_id: u64) -> impl Future<Output = Result<(), Error>> + Send;
    /// Applies its policy again.
    fn unexempt(&self, pod_cgroup_id: u64) -> impl Future<Output = Result<(), Error>> + Send;
    /// Tells that a quality-of-service class has this cgroup, which is no pod's.
    fn set_class(&self, class: QosClass, cgroup_id: u64) -> impl Future<Output = Result<(), Error>> + Send;
    /// Gives a policy to pods that have none of their own yet: one to those in a network of their own, one to those on
    /// the host's.
    fn set_unknown(
        &self,
        in_pod_network: PodPolicy,
        on_host_network: PodPolicy,
    ) -> impl Future<Output = Result<(), Error>> + Send;
}

// === impl InterceptorHandle ===

impl PolicyMap for InterceptorHandle {
    async fn set(&self, pod_cgroup_id: u64, policy: PodPolicy) -> Result<(), Error> {
        self.set_policy(pod_cgroup_id, policy).await
    }

    async fn remove(&self, pod_cgroup_id: u64) -> Result<(), Error> {
        self.remove_policy(pod_cgroup_id).await
    }

    async fn exempt(&self, pod_cgroup_id: u64) -> Result<(), Error> {
        self.set_eks_agent(pod_cgroup_id, true).await
    }

    async fn unexempt(&self, pod_cgroup_id: u64) -> Result<(), Error> {
        self.set_eks_agent(pod_cgroup_id, false).await
    }

    async fn set_class(&self, class: QosClass, cgroup_id: u64) -> Result<(), Error> {
        InterceptorHandle::set_class(self, class, cgroup_id).await
    }

    async fn set_unknown(&self, in_pod_network: PodPolicy, on_host_network: PodPolicy) -> Result<(), Error> {
        self.set_unknown_pods(in_pod_network, on_host_network).await
    }
}
