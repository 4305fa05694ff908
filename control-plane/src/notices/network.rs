//! Which addresses the control plane connects to when a tenant names the host.
//!
//! Only what is public by its form: not this host, not the networks around it, not what gives
//! machines their credentials (169.254.169.254 and its like), and nothing that carries another
//! address inside (IPv4-mapped, 6to4, Teredo, NAT64), which would be judged by the wrong half.
//! An operator may list networks besides.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// A network in CIDR form: `10.0.0.0/8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

/// Text that is no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no network; write it as 10.0.0.0/8, with zeros behind the prefix")]
pub struct Malformed(String);

impl FromStr for Network {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let malformed = || Malformed(text.to_owned());
        let (address, bits) = text.split_once('/').ok_or_else(malformed)?;
        let address: IpAddr = address.parse().map_err(|_| malformed())?;
        let bits: u8 = bits.parse().map_err(|_| malformed())?;
        let network = Network { address, bits };
        let (value, width) = wide(address);
        if bits > width || value != masked(value, bits, width) {
            return Err(malformed());
        }
        Ok(network)
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

impl Network {
    fn holds(&self, address: IpAddr) -> bool {
        let ((own, width), (value, other)) = (wide(self.address), wide(address));
        width == other && masked(value, self.bits, width) == own
    }
}

fn wide(address: IpAddr) -> (u128, u8) {
    match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()), 32),
        IpAddr::V6(address) => (address.to_bits(), 128),
    }
}

fn masked(value: u128, bits: u8, width: u8) -> u128 {
    match u32::from(width - bits) {
        128 => 0,
        zeros => value >> zeros << zeros,
    }
}

/// What the operator allows besides public addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks(pub Vec<Network>);

impl Networks {
    /// Tells whether a tenant's host may be reached at this address.
    pub fn admit(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        is_public(address) || self.list(address)
    }

    /// Tells whether the operator listed an address that only this host itself has.
    pub fn admit_loopback(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_loopback() && self.list(address)
    }

    fn list(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.holds(address))
    }
}

fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let special = match (a, b, c) {
        // This network; carriers' shared space; IETF; 6to4 relays; benchmarks; the future.
        (0, _, _)
        | (100, 64..=127, _)
        | (192, 0, 0)
        | (192, 88, 99)
        | (198, 18..=19, _)
        | (240..=255, _, _) => true,
        _ => false,
    };
    !(special
        || address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_documentation()
        || address.is_multicast())
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    let global = segments[0] & 0xe000 == 0x2000;
    let special = match (segments[0], segments[1]) {
        // Teredo, ORCHID, benchmarks and the rest of IETF's own; documentation; 6to4.
        (0x2001, 0..=0x01ff | 0x0db8) | (0x2002, _) | (0x3fff, 0..=0x0fff) => true,
        _ => false,
    };
    global && !special
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(networks: &Networks, address: &str, expect: bool) {
        assert_eq!(networks.admit(address.parse().unwrap()), expect, "{address}");
    }

    #[test]
    fn only_public_addresses_are_admitted() {
        let none = Networks::default();
        for address in ["1.1.1.1", "172.15.0.1", "172.32.0.1", "100.63.0.1", "2606:4700::1"] {
            check(&none, address, true);
        }
        let refused = [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "127.8.8.8",
            "169.254.169.254",
            "172.16.0.1",
            "192.0.0.192",
            "192.0.2.1",
            "192.168.1.1",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:10.0.0.1",
            "::ffff:127.0.0.1",
            "::127.0.0.1",
            "64:ff9b::a9fe:a9fe",
            "2001:0:a00:1::",
            "2001:db8::1",
            "2002:7f00:1::",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "ff02::1",
        ];
        for address in refused {
            check(&none, address, false);
        }
    }

    #[test]
    fn an_operator_may_list_more() {
        let list = ["10.0.0.0/8", "fd00::/8", "127.0.0.1/32"];
        let networks = Networks(list.iter().map(|text| text.parse().unwrap()).collect());
        for address in ["10.9.9.9", "::ffff:10.9.9.9", "fd12::1", "127.0.0.1"] {
            check(&networks, address, true);
        }
        for address in ["127.0.0.2", "192.168.0.1", "fe80::1"] {
            check(&networks, address, false);
        }
        assert!(networks.admit_loopback("127.0.0.1".parse().unwrap()));
        assert!(!networks.admit_loopback("10.0.0.1".parse().unwrap()));
        for bad in ["10.0.0.1/8", "10.0.0.0/33", "10.0.0.0", "x/8", "::/129", "1.2.3.4/0"] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
        assert_eq!("0.0.0.0/0".parse::<Network>().unwrap().to_string(), "0.0.0.0/0");
    }
}
