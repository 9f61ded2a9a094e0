//! `podgate whois`: which identity a process would get, and why.
//!
//! Owns the answer for people; takes the same steps as a request, never hands out credentials, never decides who may ask.

use std::{path::Path, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    error::chain,
    identity::{
        DaemonSetRef, PodUid, Pods,
        cgroup::{self, Owner, PodPath},
        cgroupfs,
        networks::Networks,
        peer::ProcessCgroups,
    },
    policy::lookup::Policies,
};

/// Answers for processes of this node.
pub(crate) struct Whois {
    /// The cgroups of processes.
    pub cgroups: Arc<dyn ProcessCgroups>,
    /// The pods of this node.
    pub pods: Arc<Pods>,
    /// The networks of pods.
    pub networks: Arc<Networks>,
    /// The policies of pods.
    pub policies: Policies,
    /// The cgroup of podgate's own pod.
    pub own_pod: Option<u64>,
    /// Which pods are the EKS Pod Identity Agent.
    pub eks_agent: Option<DaemonSetRef>,
}

/// What is known of a process.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The process.
    pub pid: i32,
    /// Its cgroup.
    pub cgroup: String,
    /// The id of its cgroup, as in the kernel's maps.
    pub cgroup_id: Option<u64>,
    /// The pod's UID.
    pub pod_uid: Option<String>,
    /// The pod, as `namespace/name`.
    pub pod: Option<String>,
    /// The service account, as `namespace/name`.
    pub service_account: Option<String>,
    /// What becomes of the pod's connections to IMDS.
    pub imds: Option<String>,
    /// The port on the pod's own loopback at which podgate listens, where no program of the pod can. None where the pod is
    /// served on the node's addresses.
    pub listener_port: Option<u16>,
    /// Why, in a sentence.
    pub because: String,
}

// === impl Whois ===

impl Whois {
    /// Answers for one process.
    ///
    /// # Errors
    /// When there is no such process, in a sentence.
    pub(crate) fn of_process(&self, pid: i32) -> Result<Answer, String> {
        let cgroup = self.cgroups.of_process(pid).map_err(|error| chain(&error))?;
        let mut answer = Answer {
            pid,
            cgroup: cgroup.display().to_string(),
            cgroup_id: cgroupfs::cgroup_id(&cgroup).ok(),
            pod_uid: None,
            pod: None,
            service_account: None,
            imds: None,
            listener_port: None,
            because: String::new(),
        };
        let found = self.pod_at(&cgroup);
        let is_own = found.as_ref().is_some_and(|found| self.is_own(found));
        answer.because = match found.map(|found| found.owner) {
            _ if is_own => "it is podgate itself, which it does not touch".to_owned(),
            None => "its cgroup is no pod's: podgate does not touch it".to_owned(),
            Some(Owner::StaticPod(config_hash)) => {
                if let Some((mirror, policy)) = self.policies.of_static_pod(&self.pods, config_hash) {
                    answer.pod = Some(mirror.full_name());
                    answer.imds = Some(label(&policy.imds));
                }
                format!(
                    "it is in a static pod (configuration {config_hash}), which has no service account: refused"
                )
            }
            Some(Owner::Pod(uid)) => self.of_pod(uid, &mut answer),
        };
        Ok(answer)
    }

    /// Fills in what is known of a pod; returns why it gets what it gets.
    fn of_pod(&self, uid: PodUid, answer: &mut Answer) -> String {
        answer.pod_uid = Some(uid.to_string());
        answer.listener_port = self.networks.listened(uid);
        let Some(pod) = self.pods.get(uid) else {
            return "the API server has not shown this pod yet: its requests wait".to_owned();
        };
        answer.pod = Some(pod.full_name());
        answer.service_account = Some(pod.service_account.to_string());
        if self.eks_agent.as_ref().is_some_and(|eks_agent| eks_agent.controls(&pod)) {
            return "it is the EKS Pod Identity Agent, which podgate does not touch".to_owned();
        }
        let Some(policy) = self.policies.of(&pod) else {
            return "the API server has not shown its namespace yet".to_owned();
        };
        answer.imds = Some(label(&policy.imds));
        let may_be_injected = !pod.injected && pod.has_env_from && !policy.imds.is_strict();
        let hint = if may_be_injected {
            "; it may be injected: variables of its containers come from envFrom, which podgate does not read"
        } else {
            ""
        };
        format!("its cgroup is the pod's, and the pod runs under it; mode: {}{hint}", label(&policy.reason))
    }

    /// The pod that a cgroup is in.
    fn pod_at(&self, cgroup: &Path) -> Option<PodPath> {
        cgroup.strip_prefix(self.cgroups.kubepods()).ok().and_then(cgroup::parse)
    }

    fn is_own(&self, found: &PodPath) -> bool {
        let id = || cgroupfs::cgroup_id(&self.cgroups.kubepods().join(&found.pod)).ok();
        self.own_pod.is_some() && id() == self.own_pod
    }
}

impl std::fmt::Debug for Whois {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Whois").field("own_pod", &self.own_pod).finish_non_exhaustive()
    }
}

fn label(value: &impl Serialize) -> String {
    let text = serde_json::to_value(value).ok();
    text.and_then(|text| text.as_str().map(str::to_owned)).unwrap_or_default()
}
