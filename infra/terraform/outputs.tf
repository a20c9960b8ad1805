output "store" {
  description = "Address of the store for configs"
  value       = "s3://${aws_s3_bucket.federations.id}/${var.prefix}"
}

output "users" {
  description = "IAM user of every edge; make an access key for each"
  value       = { for edge, user in aws_iam_user.edge : edge => user.name }
}
