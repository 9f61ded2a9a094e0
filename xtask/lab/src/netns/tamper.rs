//! What a pod can do to its own network with `CAP_NET_ADMIN`, as attackers do.
//!
//! Owns changes inside of one pod's namespace; nothing outside of it changes.

use std::net::IpAddr;

use anyhow::Context as _;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::route::{RouteProtocol, RouteScope, RouteType},
};

use super::{
    NetNs,
    wiring::{GATEWAY_V4, GATEWAY_V6, host_prefix, link_index},
};

/// `RT_TABLE_LOCAL` of `include/uapi/linux/rtnetlink.h`.
const LOCAL: u32 = 255;
/// Nobody's: what is sent to it arrives nowhere.
const NOBODY: [u8; 6] = [0x02, 0, 0, 0xff, 0xff, 0xff];

impl NetNs {
    /// From now on nothing that a pod sends arrives, and nobody tells it so.
    pub fn mute(&self) -> anyhow::Result<()> {
        self.netlink(async |handle| {
            let eth0 = link_index(&handle, "eth0").await?;
            for gateway in [GATEWAY_V4.into(), GATEWAY_V6.into()] {
                let gateway = handle.neighbours().add(eth0, gateway).link_layer_address(&NOBODY);
                gateway.replace().execute().await.context("cannot give the gateway another address")?;
            }
            Ok(())
        })
    }

    /// From now on the pod's kernel answers nothing that is sent to one of the pod's addresses: whoever listens to the
    /// wire can.
    pub fn deafen(&self, address: IpAddr) -> anyhow::Result<()> {
        self.netlink(async |handle| {
            let eth0 = link_index(&handle, "eth0").await?;
            let route = RouteMessageBuilder::<IpAddr>::new()
                .table_id(LOCAL)
                .kind(RouteType::Local)
                .protocol(RouteProtocol::Kernel)
                .scope(RouteScope::Host)
                .output_interface(eth0)
                .destination_prefix(address, host_prefix(address))?
                .build();
            handle.route().del(route).execute().await.context("cannot remove the pod's local route")
        })
    }
}
