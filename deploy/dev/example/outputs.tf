output "address" {
  value = terraform_data.address.output
}

output "services" {
  value = length(terraform_data.service)
}
