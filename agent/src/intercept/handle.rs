//! The interceptor's owner, a thread of its own, and how the rest of the agent reaches it.
//!
//! Owns the queue of commands. What must not wait for a command, the heartbeat and the counters, does not come here:
//! a command may wait for a second until another agent has changed the pins.

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
    thread,
};

use agent_common::{
    pod_listener::PodListener,
    policy::{PodPolicy, QosClass},
    target::Target,
};
use tokio::sync::{mpsc, oneshot};

use super::{Counters, Error, Fenced, Heartbeat, Interceptor, Netdevs};

/// Commands that wait. Callers wait for their answers, so there are no more than callers.
const QUEUE: usize = 16;

type Command = Box<dyn FnOnce(&mut Interceptor) + Send>;

/// Gives commands to the one owner of the [`Interceptor`], in order. A command that was sent is carried out, whether or
/// not the caller waits for its answer.
#[derive(Clone, Debug)]
pub struct InterceptorHandle {
    commands: mpsc::Sender<Command>,
    heartbeat: Heartbeat,
    counters: Counters,
}

// === impl InterceptorHandle ===

impl InterceptorHandle {
    /// Gives the interceptor to a thread of its own, for as long as a handle is left.
    pub fn spawn(interceptor: Interceptor) -> Result<Self, Error> {
        let (heartbeat, counters) = (interceptor.heartbeat(), interceptor.counters());
        let (commands, received) = mpsc::channel(QUEUE);
        thread::Builder::new()
            .name("interceptor".to_owned())
            .spawn(move || own(interceptor, received))
            .map_err(Error::Thread)?;
        Ok(Self { commands, heartbeat, counters })
    }

    /// The heartbeat, which waits for no command.
    pub fn heartbeat(&self) -> &Heartbeat {
        &self.heartbeat
    }

    /// The counters, which wait for no command.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Returns when the owner has ended, by a panic: while there are handles it does not end otherwise.
    pub async fn ended(self) {
        self.commands.closed().await;
    }

    /// See [`Interceptor::take_over`].
    pub async fn take_over(&self, target: Target, listeners: Vec<Arc<TcpListener>>) -> Result<(), Error> {
        self.call(move |interceptor| interceptor.take_over(target, &borrowed(&listeners))).await
    }

    /// See [`Interceptor::set_listeners`].
    pub async fn set_listeners(&self, listeners: Vec<Arc<TcpListener>>) -> Result<(), Error> {
        self.call(move |interceptor| interceptor.set_listeners(&borrowed(&listeners))).await
    }

    /// See [`Interceptor::set_target`].
    pub async fn set_target(&self, target: Target) -> Result<(), Error> {
        self.call(move |interceptor| interceptor.set_target(target)).await
    }

    /// See [`Interceptor::reserve`].
    pub async fn reserve(&self, address: SocketAddr) -> Result<(), Error> {
        self.call(move |interceptor| interceptor.reserve(address)).await
    }

    /// See [`Interceptor::reserve_only`].
    pub async fn reserve_only(&self, addresses: Vec<SocketAddr>) -> Result<(), Error> {
        self.call(move |interceptor| interceptor.reserve_only(&addresses)).await
    }

    /// See [`Interceptor::stop`]. Whatever the result, this agent writes no heartbeat afterwards.
    pub async fn stop(&self) -> Result<(), Error> {
        let stopped = self.call(Interceptor::stop).await;
        self.heartbeat.silence();
        stopped
    }

    /// See [`Interceptor::set_pod_listener`].
    pub async fn set_pod_listener(&self, netns_cookie: u64, listener: PodListener) -> Result<(), Error> {
        self.call(move |interceptor| interceptor.set_pod_listener(netns_cookie, listener)).await
    }

    /// See [`Interceptor::remove_pod_listener`].
    pub async fn remove_pod_listener(&self, netns_cookie: u64) -> Result<(), Error> {
        self.call(move |interceptor| interceptor.remove_pod_listener(netns_cookie)).await
    }

    /// See [`Interceptor::set_policy`].
    pub async fn set_policy(&self, pod_cgroup_id: u64, policy: PodPolicy) -> Result<(), Error> {
        self.call(move |interceptor| interceptor.set_policy(pod_cgroup_id, policy)).await
    }

    /// See [`Interceptor::remove_policy`].
    pub async fn remove_policy(&self, pod_cgroup_id: u64) -> Result<(), Error> {
        self.call(move |interceptor| interceptor.remove_policy(pod_cgroup_id)).await
    }

    /// See [`Interceptor::set_eks_agent`].
    pub async fn set_eks_agent(&self, pod_cgroup_id: u64, is_one: bool) -> Result<(), Error> {
        self.call(move |interceptor| interceptor.set_eks_agent(pod_cgroup_id, is_one)).await
    }

    /// See [`Interceptor::set_class`].
    pub async fn set_class(&self, class: QosClass, cgroup_id: u64) -> Result<(), Error> {
        self.call(move |interceptor| interceptor.set_class(class, cgroup_id)).await
    }

    /// See [`Interceptor::set_unknown_pods`].
    pub async fn set_unknown_pods(
        &self,
        in_pod_network: PodPolicy,
        on_host_network: PodPolicy,
    ) -> Result<(), Error> {
        self.call(move |interceptor| interceptor.set_unknown_pods(in_pod_network, on_host_network)).await
    }

    /// See [`Interceptor::set_netdevs`].
    pub async fn set_netdevs(&self, netdevs: Netdevs) -> Result<Option<Fenced>, Error> {
        self.call(move |interceptor| interceptor.set_netdevs(netdevs)).await
    }

    async fn call<T: Send + 'static>(
        &self,
        command: impl FnOnce(&mut Interceptor) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (reply, replied) = oneshot::channel();
        let command: Command = Box::new(move |interceptor| {
            // Nobody may wait for it any more.
            let _ = reply.send(command(interceptor));
        });
        self.commands.send(command).await.map_err(|_| Error::OwnerEnded)?;
        replied.await.map_err(|_| Error::OwnerEnded)?
    }
}

fn own(mut interceptor: Interceptor, mut commands: mpsc::Receiver<Command>) {
    while let Some(command) = commands.blocking_recv() {
        command(&mut interceptor);
    }
}

fn borrowed(listeners: &[Arc<TcpListener>]) -> Vec<&TcpListener> {
    listeners.iter().map(AsRef::as_ref).collect()
}
