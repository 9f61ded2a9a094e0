//! LimitKey identity would a process get, and why?
//!
//! Owns the answer for people; takes the very steps that a request takes, and hands nothing out.

use std::{path::Path, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    error::chain,
    identity::{
        DaemonSetRef, Pods,
        cgroup::{self, Owner, PodPath},
        cgroupfs::{self, Kubepods},
    },
    policy::lookup::Policies,
};

/// Answers for processes of this node.
#[derive(Debug)]
pub struct Whois {
    /// Where the pods' cgroups are.
    pub kubepods: Arc<Kubepods>,
    /// The pods of this node.
    pub pods: Arc<Pods>,
    /// What pods may do.
    pub policies: Policies,
    /// The cgroup of podgate's own pod.
    pub own: Option<u64>,
    /// LimitKey pods are the EKS Pod Identity Agent.
    pub eks_agent: Option<DaemonSetRef>,
}

/// What is known of a process.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Answer {
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
    /// What the pod's dials to IMDS get.
    pub imds: Option<String>,
    /// Why, in a sentence.
    pub because: String,
}

// === impl Whois ===

impl Whois {
    /// Answers for one process.
    ///
    /// # Errors
    /// When there is no such process, in a sentence.
    pub fn of_process(&self, pid: i32) -> Result<Answer, String> {
        let cgroup = self.kubepods.of_process(Some(pid)).map_err(|error| chain(&error))?;
        let mut answer = Answer {
            pid,
            cgroup: cgroup.display().to_string(),
            cgroup_id: cgroupfs::cgroup_id(&cgroup).ok(),
            pod_uid: None,
            pod: None,
            service_account: None,
            imds: None,
            because: String::new(),
        };
        let found = self.pod_at(&cgroup);
        let is_own = found.as_ref().is_some_and(|found| self.is_own(found));
        answer.because = match found.map(|found| found.owner) {
            _ if is_own => "it is podgate itself, which it does not touch".to_owned(),
            None => "its cgroup is no pod's: podgate does not touch it".to_owned(),
            Some(Owner::StaticPod(hash)) => {
                format!("it is in a static pod (configuration {hash}), which has no service account: refused")
            }
            Some(Owner::Pod(uid)) => {
                answer.pod_uid = Some(uid.to_string());
                match self.pods.get(uid) {
                    None => "the API server has not shown this pod yet: its requests wait".to_owned(),
                    Some(pod) => {
                        answer.pod = Some(pod.full_name());
                        answer.service_account = Some(pod.service_account.to_string());
                        if self.eks_agent.as_ref().is_some_and(|eks_agent| eks_agent.controls(&pod)) {
                            let because =
                                "it is the EKS Pod Identity Agent, which podgate does not touch".to_owned();
                            return Ok(Answer { because, ..answer });
                        }
                        let Some(policy) = self.policies.of(&pod) else {
                            let because = "the API server has not shown its namespace yet".to_owned();
                            return Ok(Answer { because, ..answer });
                        };
                        answer.imds = Some(label(&policy.imds));
                        format!(
                            "its cgroup is the pod's, and the pod runs under it; mode: {}",
                            label(&policy.reason)
                        )
                    }
                }
            }
        };
        Ok(answer)
    }

    /// Whether a process may command this agent: one of the node's, in no pod, or of podgate's own pod. What cannot be
    /// seen may not.
    pub fn may_command(&self, pid: i32) -> bool {
        self.is_in_no_pod_but(pid, |pod| Some(pod) == self.own)
    }

    /// Whether a process is one of the node's, in no pod, or of a pod that is one of `those` by the id of its cgroup. What
    /// cannot be seen is not.
    pub fn is_in_no_pod_but(&self, pid: i32, those: impl Fn(u64) -> bool) -> bool {
        let cgroup = self.kubepods.of_process(Some(pid));
        cgroup.is_ok_and(|cgroup| {
            !cgroup.starts_with(self.kubepods.path())
                || self.pod_at(&cgroup).and_then(|found| self.id_of(&found)).is_some_and(those)
        })
    }

    /// The pod that a cgroup is in.
    fn pod_at(&self, cgroup: &Path) -> Option<PodPath> {
        cgroup.strip_prefix(self.kubepods.path()).ok().and_then(cgroup::parse)
    }

    fn is_own(&self, found: &PodPath) -> bool {
        self.own.is_some() && self.id_of(found) == self.own
    }

    fn id_of(&self, found: &PodPath) -> Option<u64> {
        cgroupfs::cgroup_id(&self.kubepods.path().join(&found.pod)).ok()
    }
}

fn label(value: &impl Serialize) -> String {
    let text = serde_json::to_value(value).ok();
    text.and_then(|text| text.as_str().map(str::to_owned)).unwrap_or_default()
}
