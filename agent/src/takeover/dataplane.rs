//! What a takeover changes on the node, behind one trait: programs, addresses, the network interface.
//!
//! Owns nothing but that seam; never decides what changes or when.

use std::{
    net::{IpAddr, SocketAddr, TcpListener},
    sync::Arc,
};

use agent_common::{
    defense::{Defense, holds},
    pod_listener::PodListener,
    target::Target,
};
use tokio::sync::Mutex;

use super::Error;
use crate::{
    accept,
    intercept::{InterceptorHandle, Standing},
    netdev::Netdev,
};

/// The node as a takeover changes it. A trait because only root on a node can; `testing::fake_node` has the double.
pub trait Dataplane: Send + Sync + 'static {
    /// Gives the node an address. `false` when it cannot have it: IPv6 is switched off.
    fn add_address(&self, address: IpAddr) -> impl Future<Output = Result<bool, Error>> + Send;
    /// Listens for what pods send to `address`; returns the address at which pods reach it.
    fn listen(&self, address: SocketAddr) -> Result<(SocketAddr, TcpListener), Error>;
    /// Keeps other processes from listening at an address from now on.
    fn reserve(&self, address: SocketAddr) -> impl Future<Output = Result<(), Error>> + Send;
    /// Reserves no other addresses than these any more, if this agent is active.
    fn reserve_only(&self, addresses: Vec<SocketAddr>) -> impl Future<Output = Result<(), Error>> + Send;
    /// Removes every other address of podgate's from the node.
    fn remove_other_addresses(&self, used: Vec<IpAddr>) -> impl Future<Output = Result<(), Error>> + Send;
    /// Makes this agent the active one: connections are sent to `target`, and there to these listeners.
    fn take_over(
        &self,
        target: Target,
        listeners: Vec<Arc<TcpListener>>,
    ) -> impl Future<Output = Result<(), Error>> + Send;
    /// Makes these the listeners that new connections come to, if this agent is active.
    fn set_listeners(
        &self,
        listeners: Vec<Arc<TcpListener>>,
    ) -> impl Future<Output = Result<(), Error>> + Send;
    /// Sends intercepted connections to `target` from now on, if this agent is active.
    fn set_target(&self, target: Target) -> impl Future<Output = Result<(), Error>> + Send;
    /// Sends the pod in the network with this cookie to the agent's listeners there, if this agent is active, and whenever it
    /// becomes active.
    fn publish_pod_listener(
        &self,
        netns_cookie: u64,
        listener: PodListener,
    ) -> impl Future<Output = Result<(), Error>> + Send;
    /// Sends nobody there any more.
    fn withdraw_pod_listener(&self, netns_cookie: u64) -> impl Future<Output = Result<(), Error>> + Send;
    /// Tells the programs that this agent is alive, if it is active. Waits for none of the other calls.
    fn heartbeat(&self) -> Result<(), Error>;
    /// Which agent is active. Waits for none of the other calls.
    fn standing(&self) -> Result<Standing, Error>;
    /// Writes no heartbeat any more, until this agent takes over again.
    fn silence(&self);
    /// Says that this agent serves no more: connections are refused at once until another agent takes over. Writes no
    /// heartbeat afterwards, whatever the result.
    fn stop(&self) -> impl Future<Output = Result<(), Error>> + Send;
}

/// The programs and the network interface of a real node.
#[derive(Debug)]
pub(crate) struct NodeDataplane {
    interceptor: InterceptorHandle,
    netdev_name: String,
    /// Made when the first address is added: an agent that never serves leaves none behind.
    netdev: Mutex<Option<Netdev>>,
}

// === impl NodeDataplane ===

impl NodeDataplane {
    pub(crate) fn new(interceptor: InterceptorHandle, netdev_name: &str) -> Self {
        Self { interceptor, netdev_name: netdev_name.to_owned(), netdev: Mutex::default() }
    }
}

impl Dataplane for NodeDataplane {
    async fn add_address(&self, address: IpAddr) -> Result<bool, Error> {
        let mut netdev = self.netdev.lock().await;
        let netdev = match &mut *netdev {
            Some(netdev) => netdev,
            none => none.insert(Netdev::up(&self.netdev_name).await?),
        };
        Ok(netdev.add(address).await?)
    }

    fn listen(&self, address: SocketAddr) -> Result<(SocketAddr, TcpListener), Error> {
        // At a port of the kernel's choice: the programs give what is sent to `address` to this listener, and a process that
        // listens at every address, as an ingress controller does, is not in the way.
        let is_apart = holds(Defense::OwnPorts) && holds(Defense::OwnListeners);
        let port = if is_apart { 0 } else { address.port() };
        let listener = accept::listen(SocketAddr::new(address.ip(), port))
            .map_err(|source| Error::Listen { address, source })?;
        Ok((address, listener))
    }

    async fn reserve(&self, address: SocketAddr) -> Result<(), Error> {
        Ok(self.interceptor.reserve(address).await?)
    }

    async fn reserve_only(&self, addresses: Vec<SocketAddr>) -> Result<(), Error> {
        Ok(self.interceptor.reserve_only(addresses).await?)
    }

    async fn remove_other_addresses(&self, used: Vec<IpAddr>) -> Result<(), Error> {
        match &*self.netdev.lock().await {
            Some(netdev) => Ok(netdev.keep_only(&used).await?),
            None => Ok(()),
        }
    }

    async fn take_over(&self, target: Target, listeners: Vec<Arc<TcpListener>>) -> Result<(), Error> {
        Ok(self.interceptor.take_over(target, listeners).await?)
    }

    async fn set_listeners(&self, listeners: Vec<Arc<TcpListener>>) -> Result<(), Error> {
        Ok(self.interceptor.set_listeners(listeners).await?)
    }

    async fn set_target(&self, target: Target) -> Result<(), Error> {
        Ok(self.interceptor.set_target(target).await?)
    }

    async fn publish_pod_listener(&self, netns_cookie: u64, listener: PodListener) -> Result<(), Error> {
        Ok(self.interceptor.set_pod_listener(netns_cookie, listener).await?)
    }

    async fn withdraw_pod_listener(&self, netns_cookie: u64) -> Result<(), Error> {
        Ok(self.interceptor.remove_pod_listener(netns_cookie).await?)
    }

    fn heartbeat(&self) -> Result<(), Error> {
        self.interceptor.heartbeat().write()?;
        Ok(())
    }

    fn standing(&self) -> Result<Standing, Error> {
        Ok(self.interceptor.heartbeat().standing()?)
    }

    fn silence(&self) {
        self.interceptor.heartbeat().silence();
    }

    async fn stop(&self) -> Result<(), Error> {
        Ok(self.interceptor.stop().await?)
    }
}
